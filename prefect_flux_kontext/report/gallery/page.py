"""The rows that a gallery shows, as columns of text: as objects, ten thousand take 50 MB."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib import resources
from typing import TYPE_CHECKING, Any

from prefect_flux_kontext.report.results import COLUMNS, manifest_name
from prefect_flux_kontext.report.thumbnails import name_of_image, name_of_reference

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from prefect_flux_kontext.report.results import Line


_SHOWN = (
    *("id", "line", "state", "reason", "message", "file", "style", "prompt"),
    *("reference_images", "mode", "aspect_ratio", "output_format", "provider"),
    *("cost_usd", "attempts", "stored_before"),
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


class GalleryRows:
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
        references = line.get("reference_images")
        self.before.add(name_of_reference(references[0]) if references else None)
        self._rows += 1


_SCRIPTS = ("rows", "album", "numbers", "grid", "viewer", "redo", "main")


def render_page(
    rows: GalleryRows,
    *,
    title: str,
    folder: str,
    numbers: Mapping[str, Any],
    places: Mapping[str, str],
    pictures: Mapping[str, str],
) -> Iterator[str]:
    """The gallery as HTML, piece by piece, which asks nobody for anything but the files beside it.

    Args:
        rows: The rows that it shows.
        title: What it is of.
        folder: Where the files with pictures are, from the page.
        numbers: From `Numbers.told`.
        places: The file that each picture is in.
        pictures: Pictures that the page holds itself, as data URLs.
    """
    style = _file("style.css")
    script = "".join(_file(f"{name}.js") for name in _SCRIPTS)

    def filled(text: str) -> str:
        return (
            text.replace("{policy}", _policy(style, script))
            .replace("{style}", style)
            .replace("{script}", script)
        )

    above, _, below = _file("page.html").partition("{data}")
    yield filled(above)
    simple = {
        "title": title,
        "folder": folder,
        "numbers": numbers,
        "rows": len(rows),
        "places": places,
        "pictures": pictures,
    }
    yield _in_html(_as_json(simple).removesuffix("}"))
    for name, column in (("after", rows.after), ("before", rows.before)):
        yield f',"{name}":{column.packed()}'
    for name, columns in (("columns", rows.columns), ("own", rows.own)):
        yield f',"{name}":{{'
        for number, (of, column) in enumerate(columns.items()):
            yield _in_html(f"{',' if number else ''}{_as_json(of)}:{column.packed()}")
        yield "}"
    yield "}"
    yield filled(below)


def _in_html(text: str) -> str:
    """JSON in which nothing can be taken for HTML."""
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


def _policy(style: str, script: str) -> str:
    """What the page may load: its own style and script, and the files beside it."""
    return (
        f"default-src 'none'; style-src {_digest(style)}; "
        f"script-src {_digest(script)} 'self' file:; img-src data: 'self' file: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
