"""The page itself: one file of HTML with the rows, the style and the script in it."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib import resources
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from prefect_flux_kontext.report.gallery.rows import Rows

_SCRIPTS = ("rows", "album", "numbers", "grid", "viewer", "redo", "main")
_as_json = json.JSONEncoder(separators=(",", ":")).encode


def page(
    rows: Rows,
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
