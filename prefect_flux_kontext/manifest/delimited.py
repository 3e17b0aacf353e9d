"""CSV and TSV: rows of cells under a line of column names."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING

from prefect_flux_kontext.errors import ManifestError
from prefect_flux_kontext.manifest.lines import LONGEST_CELL, Columns, Line, problem_of
from prefect_flux_kontext.manifest.opening import text_lines

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


def delimited_lines(url: str, renamed: Mapping[str, str], delimiter: str) -> Iterator[Line]:
    """The rows of a CSV or TSV file in UTF-8, read as they are asked for.

    Raises:
        ManifestError: It is no such table, at the latest where it breaks.
        Exception: What the filesystem or the decoder raises.
    """
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader(text_lines(url, line_ends_at_cr=True), delimiter=delimiter, strict=True)
    begins = 1
    try:
        first = _checked(next(reader, []), 1, url)
        if "\0" in "".join(first):
            raise ManifestError(
                f"Line 1 of {url} holds NUL characters, as UTF-16 does; save the manifest as "
                "UTF-8."
            )
        columns = Columns(url, first, renamed).names
        named = max(number for number, name in enumerate(columns, start=1) if name)
        begins = reader.line_num + 1
        for values in reader:
            number = reader.line_num
            # Spreadsheets end a table with empty rows and columns.
            if any(text.strip() for text in _checked(values, number, url)):
                cells = dict(zip(columns, values, strict=False))
                yield Line(number, cells, _ragged(columns, named, values) or problem_of(cells))
            begins = number + 1
    except csv.Error as error:
        open_quote = begins < reader.line_num or "end of data" in str(error)
        where = f"; its row begins on line {begins}, perhaps with a quote that is never closed"
        raise ManifestError(
            f"Line {reader.line_num} of {url} is not CSV: {error}{where if open_quote else ''}."
        ) from None


def _ragged(columns: list[str], named: int, values: list[str]) -> str | None:
    surplus = sum(1 for text in values[len(columns) :] if text.strip())
    if surplus:
        return f"{surplus} cells more than there are columns; quote cells that hold commas"
    if len(values) < named:
        return f"{len(values)} cells where there are {named} columns"
    return None


def _checked(values: list[str], line: int, url: str) -> list[str]:
    text = "".join(values)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ManifestError(
                f"Line {line} of {url} is not in UTF-8; save the manifest as UTF-8."
            ) from None
    return values
