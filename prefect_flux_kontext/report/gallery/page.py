"""The gallery's page: its rows, held as columns of text, and its HTML.

As Python objects, ten thousand rows would take 50 MB.
"""

from __future__ import annotations

import base64
import hashlib
import json
from importlib import resources
from typing import TYPE_CHECKING, Any

from prefect_flux_kontext.report.gallery.thumbnails import GALLERY_FOLDER
from prefect_flux_kontext.report.results import COLUMNS, Line, original_column_name
from prefect_flux_kontext.report.thumbnails import image_thumbnail_name, reference_thumbnail_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from prefect_flux_kontext.storage.filesystem import OutputFolder

_SHOWN_COLUMNS = (
    *("id", "line", "state", "reason", "message", "file", "style", "prompt"),
    *("variant_number", "verdict", "check_flags"),
    *("reference_images", "mode", "aspect_ratio", "matched_ratio", "output_format", "provider"),
    *("cost_usd", "attempts", "stored_before"),
    *("width", "height", "bytes", "format", "task_id", "submitted_at"),
    *("waiting_seconds", "generation_seconds", "download_seconds"),
)

# In the order in which they use each other.
_SCRIPTS = ("rows", "thumbnails", "numbers", "verdicts", "grid", "viewer", "redo", "main", "live")

_as_json = json.JSONEncoder(separators=(",", ":")).encode


class Column:
    """The values of one column, each held as a line of JSON; the first `empty` rows have none."""

    def __init__(self, empty: int = 0) -> None:
        self._lines = bytearray(b"null\n" * empty)

    def add(self, value: Any) -> None:
        """Add the value of the next row."""
        self._lines += (_as_json(value) + "\n").encode()

    def __iter__(self) -> Iterator[Any]:
        return map(json.loads, self._lines.splitlines())

    def to_json(self) -> str:
        """Encode the column; a column with many equal values holds each distinct value once."""
        texts = self._lines.decode().splitlines()
        distinct = list(dict.fromkeys(texts))
        if len(distinct) > len(texts) / 2:
            return f'{{"values":[{",".join(texts)}]}}'
        positions = {text: str(position) for position, text in enumerate(distinct)}
        indexes = ",".join(positions[text] for text in texts)
        return f'{{"values":[{",".join(distinct)}],"indexes":[{indexes}]}}'


class GalleryRows:
    """The rows of a gallery."""

    def __init__(self) -> None:
        self.columns = {name: Column() for name in _SHOWN_COLUMNS}
        self.custom: dict[str, Column] = {}  # by their names in the manifest
        self.after = Column()  # names of the thumbnails of images, None for rows without one
        self.before = Column()  # likewise of references
        self._rows = 0

    def __len__(self) -> int:
        return self._rows

    def add(self, line: Line) -> None:
        """Add a line of the result manifest."""
        for name, column in self.columns.items():
            column.add(line.get(name))
        custom = {original_column_name(name): line[name] for name in line if name not in COLUMNS}
        for name in custom:
            if name not in self.custom:
                self.custom[name] = Column(self._rows)
        for name, column in self.custom.items():
            column.add(custom.get(name))
        self.after.add(image_thumbnail_name(line["key"]) if line["state"] == "stored" else None)
        references = line.get("reference_images")
        self.before.add(reference_thumbnail_name(references[0]) if references else None)
        self._rows += 1

    def to_values(self) -> dict[str, Any]:
        """Return all columns as lists."""
        return {
            "columns": {name: list(column) for name, column in self.columns.items()},
            "custom": {name: list(column) for name, column in self.custom.items()},
            "after": list(self.after),
            "before": list(self.before),
        }


def render_page(
    rows: GalleryRows,
    output: OutputFolder,
    *,
    statistics: Mapping[str, Any],
    files: Mapping[str, str],
    embedded: Mapping[str, str],
    live: Mapping[str, Any] | None = None,
) -> Iterator[str]:
    """Yield the HTML of the gallery in pieces. The page loads nothing but the files beside it.

    Args:
        rows: The rows of the page.
        output: The output, whose name is the title.
        statistics: The result of `Statistics.summarize`.
        files: The name of the file that holds each thumbnail.
        embedded: Thumbnails that the page itself holds, as data URLs.
        live: What a page that is served and updates itself needs; None for a file.
    """
    style = _read_file("style.css")
    script = "".join(_read_file(f"{name}.js") for name in _SCRIPTS)

    page = _read_file("page.html")
    page = page.replace("{policy}", _build_policy(style, script, is_live=live is not None))
    page = page.replace("{style}", style).replace("{script}", script)
    above, _, below = page.partition("{data}")
    yield above
    simple = {
        "title": str(output).rstrip("/").rpartition("/")[2],
        "folder": GALLERY_FOLDER,
        "statistics": statistics,
        "rows": len(rows),
        "thumbnailFiles": files,
        "embedded": embedded,
        "live": live,
    }
    yield _escape_html(_as_json(simple).removesuffix("}"))
    for name, column in (("after", rows.after), ("before", rows.before)):
        yield f',"{name}":{column.to_json()}'
    for name, columns in (("columns", rows.columns), ("custom", rows.custom)):
        yield f',"{name}":{{'
        for number, (column_name, column) in enumerate(columns.items()):
            comma = "," if number else ""
            yield _escape_html(f"{comma}{_as_json(column_name)}:{column.to_json()}")
        yield "}"
    yield "}"
    yield below


def _escape_html(text: str) -> str:
    """Escape JSON so that a browser cannot take any of it for HTML."""
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


def _build_policy(style: str, script: str, *, is_live: bool) -> str:
    """Build the content security policy: the page's own style and script, files beside it."""
    policy = (
        f"default-src 'none'; style-src {_digest(style)}; "
        f"script-src {_digest(script)} 'self' file:; img-src data: 'self' file: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
    return f"{policy}; connect-src 'self'" if is_live else policy


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _read_file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
