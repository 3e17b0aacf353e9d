"""What every manifest format comes down to: numbered lines of named cells, all of them text."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from prefect_flux_kontext.errors import ManifestError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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
        "style",
        "output",
    }
)
"""The columns that mean something; all others are the user's own."""

LONGEST_CELL = 131_072
"""Characters of a cell, thirteen times the longest prompt: csv's own limit, for every format."""


class Line(NamedTuple):
    """A line of a manifest, or a row where the format has no lines.

    Attributes:
        number: From 1, as an editor shows it; of a row of several lines the last.
        cells: Column name to text.
        problem: Why it cannot be a row, where that is known by now.
        version: Tells what its image holds, where a listing says that (an ETag).
    """

    number: int
    cells: dict[str, str]
    problem: str | None = None
    version: str | None = None


class Columns:
    """The columns of a manifest, checked and renamed.

    Args:
        url: The manifest, for messages.
        names: Its columns, as they stand.
        renamed: Column that is meant, to the column's name in the manifest.

    Raises:
        ManifestError: A column stands there twice, is missing, or is nearly one that is meant.
    """

    def __init__(self, url: str, names: Sequence[str], renamed: Mapping[str, str]) -> None:
        self.names = self._renamed(url, [name.strip() for name in names], renamed)
        twice = {name for name in self.names if name and self.names.count(name) > 1}
        if twice:
            raise ManifestError(f"The manifest {url} has a column twice: {sorted(twice)}.")
        for name in self.names:
            meant = re.sub(r"[\s-]+", "_", name.casefold())
            if meant in COLUMNS and meant != name:
                # It would be taken for a column of the user's own, and the default paid for.
                raise ManifestError(
                    f"The manifest {url} has a column {name!r}; spell it `{meant}`."
                )
        if not {"image", "images", "prompt"} & set(self.names):
            told = ", ".join(names)[:200] or "nothing"
            raise ManifestError(
                f"The manifest {url} has neither a column `image` nor `prompt`; its first line "
                f"names {told}.{_guess(names)}"
            )

    def _renamed(self, url: str, names: list[str], renamed: Mapping[str, str]) -> list[str]:
        for meant, name in renamed.items():
            if name not in names:
                raise ManifestError(
                    f"The manifest {url} has no column {name!r} to be taken as {meant!r}; it has "
                    f"{', '.join(names)[:200]}."
                )
        back = {name: meant for meant, name in renamed.items()}
        return [back.get(name, name) for name in names]


def _guess(names: Sequence[str]) -> str:
    text = "".join(names)
    if text.lstrip().startswith("<"):
        return " It looks like a page of HTML or XML, such as an error page."
    for sign, told in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        if len(names) == 1 and sign in text:
            return f" Its cells seem to be separated by {told}; separate them by commas."
    if any("://" in name for name in names):
        return " It seems to have no line of column names; put one first."
    if not any(names):
        return ""
    return " If it is one of these, say which: --columns image=NAME (in a flow, columns)."


def as_text(value: Any) -> str:
    """The text of a cell from a format that has types: numbers plain, lists and objects as JSON.

    Raises:
        ValueError: It has no text that means the same: NaN, infinity, bytes.
    """
    match value:
        case None:
            return ""
        case str():
            return value
        case bool():
            return "true" if value else "false"
        case float() if not math.isfinite(value):
            raise ValueError(f"{value} is not a value")
        case int() | float():
            return str(value)
        case list() | dict():
            return json.dumps(value, ensure_ascii=False, allow_nan=False, default=str)
        case bytes() | bytearray() | memoryview():
            raise ValueError("it holds bytes, not text")
        case _:
            return str(value)


def to_cells(values: Mapping[str, Any]) -> tuple[dict[str, str], str | None]:
    """The cells of a row from a format that has types, and what is wrong with them."""
    cells, problem = {}, None
    for name, value in values.items():
        try:
            cells[name] = as_text(value)
        except (ValueError, RecursionError) as error:
            problem = problem or f"{name}: {str(error)[:200]}"
    return cells, problem or find_cell_problem(cells)


def find_cell_problem(cells: Mapping[str, str]) -> str | None:
    """What is wrong with cells whatever they mean."""
    for name, text in cells.items():
        if len(text) > LONGEST_CELL:
            return f"{name} has {len(text):,} characters; a cell has at most {LONGEST_CELL:,}"
        if "\0" in text:
            return f"{name} holds a NUL character"
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                return f"{name} holds half a character (a lone surrogate)"
    return None
