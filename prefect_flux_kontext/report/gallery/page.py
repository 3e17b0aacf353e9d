"""The page itself: one file of HTML with the rows, the style and the script in it."""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from importlib import resources
from typing import TYPE_CHECKING, Any

from prefect_flux_kontext.report.columns import COLUMNS, manifest_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from prefect_flux_kontext.report.columns import Line

_SCRIPTS = ("rows", "album", "numbers", "grid", "viewer", "redo", "main")
_SHOWN = (
    *("id", "line", "state", "reason", "message", "file", "style", "prompt", "references"),
    *("mode", "aspect_ratio", "output_format", "provider", "price", "attempts", "already"),
    *("width", "height", "bytes", "format", "task_id", "submitted_at"),
    *("waiting_seconds", "generation_seconds", "download_seconds"),
)
_KEPT = {"key", *_SHOWN}


def shown(row: Line) -> Line:
    """What the gallery needs of a row: ten thousand of them are held at once."""
    return {
        sys.intern(name): value
        for name, value in row.items()
        if name in _KEPT or name not in COLUMNS
    }


def write_page(
    rows: Sequence[Line],
    *,
    title: str,
    folder: str,
    numbers: Mapping[str, Any],
    after: Sequence[str | None],
    before: Sequence[str | None],
    places: Mapping[str, str],
    pictures: Mapping[str, str],
) -> str:
    """The gallery as HTML, which asks nobody for anything but the files beside it.

    Args:
        rows: The rows that it shows.
        title: What it is of.
        folder: Where the files with pictures are, from the page.
        numbers: From `Numbers.told`.
        after: For each row the name of its image's picture.
        before: For each row the name of its reference's picture.
        places: The file that each picture is in.
        pictures: Pictures that the page holds itself, as data URLs.
    """
    own = dict.fromkeys(name for row in rows for name in row if name not in COLUMNS)
    data = {
        "title": title,
        "folder": folder,
        "numbers": numbers,
        "rows": len(rows),
        "columns": {name: _packed([row.get(name) for row in rows]) for name in _SHOWN},
        "own": {manifest_name(name): _packed([row.get(name) for row in rows]) for name in own},
        "after": _packed(list(after)),
        "before": _packed(list(before)),
        "places": {name: places[name] for name in [*after, *before] if name and name in places},
        "pictures": pictures,
    }
    style = _file("style.css")
    script = "".join(_file(f"{name}.js") for name in _SCRIPTS)
    return (
        _file("page.html")
        .replace("{policy}", _policy(style, script))
        .replace("{style}", style)
        .replace("{script}", script)
        .replace("{data}", _in_html(data))
    )


def _packed(values: list[Any]) -> dict[str, Any]:
    """A column; where values are often the same, each of them once."""
    texts = [json.dumps(value) for value in values]
    different = list(dict.fromkeys(texts))
    if len(different) > len(values) / 2:
        return {"values": values}
    places = {text: place for place, text in enumerate(different)}
    return {
        "values": [json.loads(text) for text in different],
        "of": [places[text] for text in texts],
    }


def _in_html(data: Any) -> str:
    """JSON in which nothing can be taken for HTML."""
    text = json.dumps(data, separators=(",", ":"))
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
