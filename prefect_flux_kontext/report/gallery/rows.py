"""The rows that a gallery shows, as columns of text: as objects, ten thousand take 50 MB."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from prefect_flux_kontext.report.columns import COLUMNS, manifest_name
from prefect_flux_kontext.report.pictures import name_of_image, name_of_reference

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prefect_flux_kontext.report.columns import Line

_SHOWN = (
    *("id", "line", "state", "reason", "message", "file", "style", "prompt", "references"),
    *("mode", "aspect_ratio", "output_format", "provider", "price", "attempts", "already"),
    *("width", "height", "bytes", "format", "task_id", "submitted_at"),
    *("waiting_seconds", "generation_seconds", "download_seconds"),
)
_as_json = json.JSONEncoder(separators=(",", ":")).encode


class Column:
    """The values of one column, each a line of JSON.

    Args:
        empty: How many rows before the first have no value.
    """

    def __init__(self, empty: int = 0) -> None:
        self._lines = bytearray(b"null\n" * empty)

    def add(self, value: Any) -> None:
        """Add the value of the next row."""
        self._lines += (_as_json(value) + "\n").encode()

    def __iter__(self) -> Iterator[Any]:
        return map(json.loads, self._lines.splitlines())

    def packed(self) -> str:
        """The column as JSON; where values are often the same, each of them once."""
        texts = self._lines.decode().splitlines()
        different = list(dict.fromkeys(texts))
        if len(different) > len(texts) / 2:
            return f'{{"values":[{",".join(texts)}]}}'
        places = {text: str(place) for place, text in enumerate(different)}
        of = ",".join(places[text] for text in texts)
        return f'{{"values":[{",".join(different)}],"of":[{of}]}}'


class Rows:
    """The rows of a gallery.

    Attributes:
        columns: What is shown of ours, by name.
        own: Your own columns, as your manifest names them.
        after: The name of the picture of each row's image; None where it has none.
        before: The name of the picture of each row's reference, likewise.
    """

    def __init__(self) -> None:
        self.columns = {name: Column() for name in _SHOWN}
        self.own: dict[str, Column] = {}
        self.after = Column()
        self.before = Column()
        self._rows = 0

    def __len__(self) -> int:
        return self._rows

    def add(self, line: Line) -> None:
        """Add a line of the result manifest."""
        for name, column in self.columns.items():
            column.add(line.get(name))
        own = {manifest_name(name): line[name] for name in line if name not in COLUMNS}
        for name in own:
            if name not in self.own:
                self.own[name] = Column(self._rows)
        for name, column in self.own.items():
            column.add(own.get(name))
        self.after.add(name_of_image(line["key"]) if line["state"] == "stored" else None)
        references = line.get("references")
        self.before.add(name_of_reference(references[0]) if references else None)
        self._rows += 1
