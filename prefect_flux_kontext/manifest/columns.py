"""The common form of every manifest format: numbered lines of named text cells."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from prefect_flux_kontext.errors import ManifestError
from prefect_flux_kontext.storage.names import IMAGE_ENDING

COLUMNS = frozenset(
    {
        "id",
        "image",
        "images",
        "prompt",
        "mode",
        "aspect_ratio",
        "output_format",
        "provider",
        "variants",
        "style",
        "output",
    }
)
"""Columns with a meaning. All other columns are kept as user data."""

MAX_CELL_CHARACTERS = 131_072
"""The default field limit of the `csv` module, applied to every format. It is thirteen times the
longest prompt."""

MAX_LINE_CHARACTERS = 1_000_000
"""Of a line, or of a value in a JSON text; more of it is never held."""

_IMAGE_COLUMN = re.compile(r"image|img|photo|foto|pic|bild", re.IGNORECASE)


MAX_COLUMNS = 2_000

MAX_BLANK_ROWS = 1_000_000
"""As many as a manifest may have rows. Compressed, blank rows cost an attacker nothing."""


class Line(NamedTuple):
    """One line of a manifest, or one row where the format has no lines."""

    number: int  # from 1, as an editor shows it; of a row of several lines the last
    cells: dict[str, str]
    problem: str | None = None  # why the line is invalid, if that is already known
    version: str | None = None  # ETag of the image, if the folder listing has one


def standardize_columns(url: str, names: Sequence[str], renames: Mapping[str, str]) -> list[str]:
    """Check the columns of a manifest, and return their names with those of `renames` replaced.

    `renames` maps a standard name to the manifest's name.

    Raises:
        ManifestError: A standard column is missing, appears twice, or differs from its name
            only in case, spaces or dashes.
    """
    if len(names) > MAX_COLUMNS:
        raise ManifestError(
            f"The manifest {url} has {len(names):,} columns; the limit is {MAX_COLUMNS:,}."
        )
    columns = _apply_renames(url, [name.strip() for name in names], renames)
    repeated = {name for name, count in Counter(columns).items() if name and count > 1}
    if repeated:
        raise ManifestError(
            f"The manifest {url} has duplicate columns: {', '.join(sorted(repeated))}. "
            "Rename or remove one of each."
        )
    for name in columns:
        standard = re.sub(r"[\s-]+", "_", name.casefold())
        if standard in COLUMNS and standard not in columns:
            # Otherwise it counts as user data, and the rows are paid for with the default.
            raise ManifestError(
                f"The manifest {url} has a column {name!r}; rename it to `{standard}`."
            )
    if {"image", "images", "prompt"} & set(columns):
        return columns
    if not any(name.strip() for name in names):
        raise ManifestError(
            f"The manifest {url} has no column names; it needs a column `image` or `prompt`."
        )
    raise ManifestError(
        f"The manifest {url} has no column `image` or `prompt`; its columns are: "
        f"{_show_names(url, names)}.{_suggest_fix(names)}"
    )


def _apply_renames(url: str, names: list[str], renames: Mapping[str, str]) -> list[str]:
    for standard, name in renames.items():
        if name not in names:
            raise ManifestError(
                f"The manifest {url} has no column {name!r} to use as {standard!r}; its "
                f"columns are {_show_names(url, names)}."
            )
    standard_names = {name: standard for standard, name in renames.items()}
    # A column whose standard name another column takes is the user's own.
    own_names = {standard: f"{standard} (own)" for standard in renames}
    return [standard_names.get(name, own_names.get(name, name)) for name in names]


def to_cells(values: Mapping[str, Any]) -> tuple[dict[str, str], str | None]:
    """Convert the typed values of a row to cells; return also the first problem with them."""
    cells, problem = {}, None
    if isinstance(image := values.get("image"), dict):
        problem = (
            f"image: the cell is a struct of {', '.join(map(str, image))[:80]}, not a URL or a "
            "path; write its image to a file"
        )
    for name, value in values.items():
        try:
            cells[name] = value if type(value) is str else to_text(value)
        except (ValueError, RecursionError) as error:
            cells[name] = ""
            if name in COLUMNS:
                problem = problem or f"{name}: {str(error)[:200]}"
    return cells, problem or find_cell_problem(cells)


def find_cell_problem(cells: dict[str, str]) -> str | None:
    """Return the first problem with the text of a standard column, or None.

    Text of other columns that cannot be used is emptied: it must not refuse the row.
    """
    if not _find_text_problem("".join(cells.values())):
        return None
    for name, text in cells.items():
        if problem := _find_text_problem(text):
            if name in COLUMNS:
                return f"{name} {problem}"
            cells[name] = ""
    return None


def looks_like_image(name: str, text: str) -> bool:
    """Return whether a value of a column seems to be the path or URL of an image."""
    if any(sign.isspace() for sign in text):
        return False
    is_url = text.startswith(("http://", "https://"))
    path = re.split(r"[?#]", text, maxsplit=1)[0] if is_url else text
    return bool(IMAGE_ENDING.search(path) or (is_url and _IMAGE_COLUMN.search(name)))


def _find_text_problem(text: str) -> str | None:
    if len(text) > MAX_CELL_CHARACTERS:
        return f"has {len(text):,} characters; the limit is {MAX_CELL_CHARACTERS:,}"
    if "\0" in text:
        return "contains a NUL character"
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return "contains half a character (a lone surrogate)"
    return None


def to_text(value: Any) -> str:
    """Convert a value to text: lists and objects as JSON. NaN, infinity and bytes have none."""
    match value:
        case None:
            return ""
        case str():
            return value
        case bool():
            return "true" if value else "false"
        case float() if not math.isfinite(value):
            raise ValueError(f"{value} is not a valid number")
        case list() | dict():
            return json.dumps(value, ensure_ascii=False, allow_nan=False, default=str)
        case bytes() | bytearray() | memoryview():
            raise ValueError("the cell holds bytes, not text")
        case _:
            return str(value)


def _show_names(url: str, names: Sequence[str]) -> str:
    """Return the column names. Of a page on the web, only those that look like names."""
    is_web = url.lower().startswith(("http:", "https:"))
    shown = [name if not is_web or re.fullmatch(r"[\w .-]{1,40}", name) else "…" for name in names]
    return ", ".join(shown)[:200]


def _suggest_fix(names: Sequence[str]) -> str:
    text = "".join(names)
    if text.lstrip().startswith("<"):
        return " The file looks like an HTML or XML page, such as an error page."
    for delimiter, name, kind in ((";", "semicolons", "semicolon"), ("\t", "tabs", "tsv")):
        if len(names) == 1 and delimiter in text:
            return (
                f" The delimiter seems to be {name}; use commas, or give --format {kind} (in a "
                "flow, manifest_format)."
            )
    if len(names) == 1 and "|" in text:
        return " The delimiter seems to be pipes; use commas."
    if any("://" in name for name in names):
        return " The header seems to be missing; add a first line with the column names."
    return (
        " If one of these columns holds the images, name it: --columns image=NAME (in a flow, "
        "columns)."
    )
