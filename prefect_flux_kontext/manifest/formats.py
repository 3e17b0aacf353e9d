"""Readers of CSV, TSV and JSON Lines manifests on any fsspec filesystem, with size limits."""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import re
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from prefect_flux_kontext.errors import ManifestError
from prefect_flux_kontext.manifest.columns import (
    COLUMNS,
    MAX_BLANK_ROWS,
    MAX_CELL_CHARACTERS,
    MAX_COLUMNS,
    MAX_LINE_CHARACTERS,
    Line,
    find_cell_problem,
    standardize_columns,
    to_cells,
)
from prefect_flux_kontext.manifest.text_io import decompress, split_values
from prefect_flux_kontext.references.remote import open_source

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
# A file that exceeds both limits is a decompression bomb: no real table compresses that well.
_BOMB_MIN_CHARACTERS = 2**26
_BOMB_RATIO = 200
# Reading a million cells takes 0.7 to 1.4 s, and a small file can have any number of empty ones.
_MAX_CELLS = 3_000_000
_MAX_CELLS_A_BYTE = 4
_CHUNK_BYTES = 2**20
# The first line by which a file names its delimiter to Excel.
_SEPARATOR_LINE = re.compile(r"sep=([,;\t])", re.IGNORECASE)
# Column lists of JSON objects that are kept, so that each shape is checked once.
_MAX_CACHED_SHAPES = 1_000


ManifestFormat = Literal["csv", "semicolon", "tsv", "json", "parquet"]

DELIMITERS = {"csv": ",", "semicolon": ";", "tsv": "\t"}

_KIND_BY_EXTENSION: dict[str, ManifestFormat] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".pq": "parquet",
}
_KIND_BY_CONTENT_TYPE: dict[str, ManifestFormat] = {
    "text/csv": "csv",
    "text/tab-separated-values": "tsv",
    "application/json": "json",
    "application/jsonl": "json",
    "application/x-ndjson": "json",
    "application/vnd.apache.parquet": "parquet",
}
_HEAD_BYTES = 4_096


def detect_kind(url: str) -> ManifestFormat:
    """Return the format by the file name; else by the content type, else by the content.

    Raises:
        ManifestError: The file is a workbook, or too large to be read from the web.
        Exception: What the filesystem or the decoder raises.
    """
    extension, compression = detect_format(url)
    if extension in _KIND_BY_EXTENSION:
        return _KIND_BY_EXTENSION[extension]
    with open_source(url) as (stored, content_type):
        if content_type in _KIND_BY_CONTENT_TYPE:
            return _KIND_BY_CONTENT_TYPE[content_type]
        with decompress(stored, compression, url) as data:
            head = data.read(_HEAD_BYTES)
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] in (b"{", b"["):
        return "json"
    return "csv"


def detect_format(url: str) -> tuple[str, str | None]:
    """Return the lowercase file extension and the compression, or None where there is none.

    `m.csv.gz` gives `(".csv", "gzip")`. Only the path of a web URL counts.
    """
    path = urlsplit(url).path if url.lower().startswith(("http://", "https://")) else url
    name = path.replace("\\", "/").rsplit("/", 1)[-1].lower()
    compression = None
    for ending, known in _COMPRESSIONS.items():
        if name.endswith(ending):
            name, compression = name.removesuffix(ending), known
    dot = name.rfind(".")
    return (name[dot:] if dot > 0 else ""), compression


@contextmanager
def as_manifest_error(url: str) -> Iterator[None]:
    """Turn every error of a filesystem or decoder into one that names the manifest.

    Raises:
        ManifestError: In place of any other error.
    """
    try:
        yield
    except ManifestError:
        raise
    except FileNotFoundError:
        raise ManifestError(f"There is no manifest at {url}.") from None
    except PermissionError as error:
        raise ManifestError(f"No permission to read the manifest {url}: {error}") from None
    except Exception as error:  # noqa: BLE001 - each filesystem has errors of its own
        reason = str(error) or type(error).__name__
        raise ManifestError(f"The manifest {url} cannot be read: {reason}") from None


def read_delimited(
    url: str, renames: Mapping[str, str], delimiter: str, *, is_given: bool = True
) -> Iterator[Line]:
    """Yield the rows of a CSV or TSV file in UTF-8, reading no further than needed.

    Args:
        url: The file.
        renames: Standard column name to the name that the file uses for it.
        delimiter: What separates cells.
        is_given: Whether the user said so; else the header may show another delimiter.

    Raises:
        ManifestError: The file is not a valid table. Raised when the invalid line is reached.
        Exception: What the filesystem or the decoder raises.
    """
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    blank_rows = row_characters = 0
    line = ""
    known = None if is_given else {*COLUMNS, *renames.values()}
    lines, delimiter, lines_before = _read_preamble(url, delimiter, known)

    def limit_row() -> Iterator[str]:
        nonlocal row_characters, line
        for line in lines:
            row_characters += len(line)
            if row_characters > MAX_LINE_CHARACTERS:
                raise ManifestError(
                    f"The row that starts on line {first_line + lines_before} of {url} has more "
                    f"than {MAX_LINE_CHARACTERS:,} characters; it may have a quote that is never "
                    "closed."
                )
            yield line

    reader = csv.reader(limit_row(), delimiter=delimiter, strict=True)
    first_line = 1
    try:
        header = next(reader, [])
        _check_encoding(header, 1, url)
        if "\0" in "".join(header):
            raise ManifestError(
                f"Line 1 of {url} contains NUL characters, as in UTF-16; save the manifest as "
                "UTF-8."
            )
        columns = standardize_columns(url, header, renames)
        has_line_feeds = line.endswith("\n")
        width = max(number for number, name in enumerate(columns, start=1) if name)
        first_line = reader.line_num + 1
        for values in reader:
            number = reader.line_num + lines_before
            text = _check_encoding(values, number, url)
            row_characters = 0
            # Spreadsheets end a table with empty rows and columns.
            if text.strip():
                cells = dict(zip(columns, values, strict=False))
                problem = _find_width_problem(columns, width, values)
                if has_line_feeds and line.endswith("\r"):
                    # Another program would read one cell here, of which this is the beginning.
                    problem = "the row ends with a carriage return alone; quote the cell with it"
                if len(text) > MAX_CELL_CHARACTERS or "\0" in text:
                    problem = problem or find_cell_problem(cells)
                yield Line(number, cells, problem)
            else:
                blank_rows = count_blank_row(blank_rows, url)
            first_line = reader.line_num + 1
    except csv.Error as error:
        has_open_quote = first_line < reader.line_num or "end of data" in str(error)
        hint = (
            f"; the row starts on line {first_line + lines_before} and may have a quote that is "
            "never closed"
        )
        raise ManifestError(
            f"Line {reader.line_num + lines_before} of {url} is not valid CSV: {error}"
            f"{hint if has_open_quote else ''}."
        ) from None


def _quote_text_marks(lines: Iterator[str]) -> Iterator[str]:
    """Yield the lines of a TSV file, quoted where a quotation mark is part of the text.

    Many tools write TSV without quotes, so that a cell may begin with a mark. That is so where a
    line is no valid row by itself but has a cell for each column.
    """
    width = 0
    for line in lines:
        text = line.rstrip("\r\n")
        cells = text.split("\t")
        width = width or len(cells)
        if '"' in line and len(cells) == width:
            try:
                list(csv.reader([text], delimiter="\t", strict=True))
            except csv.Error:
                quoted = ('"' + cell.replace('"', '""') + '"' for cell in cells)
                yield "\t".join(quoted) + line[len(text) :]
                continue
        yield line


def _detect_delimiter(header: str, delimiter: str, known: set[str]) -> str:
    """Return the delimiter that gives a known column name, or else the most columns."""

    def split(by: str) -> list[str]:
        return [name.strip() for name in next(csv.reader([header], delimiter=by), [])]

    try:
        columns = {by: split(by) for by in (delimiter, *DELIMITERS.values())}
    except csv.Error:
        return delimiter
    return max(columns, key=lambda by: (bool(known & set(columns[by])), len(columns[by])))


def _read_preamble(
    url: str, delimiter: str, known: set[str] | None
) -> tuple[Iterator[str], str, int]:
    """Return the lines after a line that declares the delimiter, the delimiter, and their offset.

    Args:
        url: The file.
        delimiter: The delimiter of a file that declares none.
        known: Column names by which another delimiter is recognized; None to look for none.

    Raises:
        ManifestError: The file is a workbook or an archive.
    """
    lines = _read_text_lines(url, line_ends_at_cr=True)
    first = next(lines, "")
    if first.startswith("PK\3\4"):
        raise ManifestError(
            f"The manifest {url} is a workbook or an archive; save the sheet as CSV in UTF-8."
        )
    lines_before = 0
    if declared := _SEPARATOR_LINE.fullmatch(first.strip().strip('"')):
        # Excel writes and reads this line.
        delimiter, lines_before = declared[1], 1
    else:
        lines = itertools.chain([first] if first else [], lines)
        if known is not None:
            delimiter = _detect_delimiter(first.removesuffix("\n"), delimiter, known)
    return (_quote_text_marks(lines) if delimiter == "\t" else lines), delimiter, lines_before


def read_json_lines(url: str, renames: Mapping[str, str]) -> Iterator[Line]:
    """Yield the rows of a JSON Lines file, or of a JSON array, in UTF-8, as far as needed.

    A line that is not an object is yielded with its problem; the lines after it are still read.

    Raises:
        ManifestError: The file is no such file.
        Exception: What the filesystem or the decoder raises.
    """
    columns: dict[tuple[str, ...], list[str]] = {}
    unseen = set(renames.values())
    blank_rows = 0
    for number, line in _read_json_texts(url):
        text = line.strip()
        if not text:
            blank_rows = count_blank_row(blank_rows, url)
            continue
        if number == 1 and text.startswith(("<", "\udcff", "\udcfe")):
            raise ManifestError(
                f"The manifest {url} is not JSON Lines in UTF-8; it starts with {text[:30]!r}."
            )
        try:
            values = _parse_object(text)
        except (ValueError, RecursionError) as error:
            yield Line(number, {}, _explain_error(error))
            continue
        shape = tuple(values)
        if shape not in columns:
            unseen.difference_update(shape)
            if len(columns) == _MAX_CACHED_SHAPES:
                columns.clear()
            try:
                columns[shape] = resolve_columns(url, shape, renames)
            except ManifestError as error:
                yield Line(number, {}, error.message.rstrip("."))
                continue
        cells, problem = to_cells(dict(zip(columns[shape], values.values(), strict=True)))
        yield Line(number, cells, problem)
    check_renames_used(url, unseen)


def count_blank_row(earlier: int, url: str) -> int:
    """Return the number of blank rows with one more.

    Raises:
        ManifestError: There are too many.
    """
    if earlier == MAX_BLANK_ROWS:
        raise ManifestError(
            f"The manifest {url} has more than {MAX_BLANK_ROWS:,} blank rows; remove them."
        )
    return earlier + 1


def check_cells(cells: int, size: int, url: str) -> None:
    """Check that a file has no more cells than the size of a real table allows.

    Raises:
        ManifestError: There are too many.
    """
    if cells > _MAX_CELLS and cells > _MAX_CELLS_A_BYTE * size:
        raise ManifestError(
            f"The manifest {url} has {size:,} bytes and more than {_MAX_CELLS:,} cells, nearly "
            "all of them empty or equal; leave out columns that are empty."
        )


def _read_json_texts(url: str) -> Iterator[tuple[int, str]]:
    """Yield the lines of a JSON Lines file, or the values of an array or of indented JSON.

    Raises:
        ManifestError: A line or value is too long, or the array is not complete.
        Exception: What the filesystem or the decoder raises.
    """
    pieces = _read_text_lines(url, line_ends_at_cr=False, is_limited=False)
    number, start = 1, next(pieces, "")
    while start.isspace():
        yield number, start
        number, start = number + 1, next(pieces, "")
    lines = itertools.chain([start], pieces)
    if start.lstrip().startswith("[") or start.strip() == "{":
        yield from split_values(lines, url, number)
        return
    for place, line in enumerate(lines, number):
        _check_line_length(line, place, url)
        yield place, line


def resolve_columns(url: str, names: Sequence[str], renames: Mapping[str, str]) -> list[str]:
    """Return the standard column names of one object, which may omit renamed columns.

    Raises:
        ManifestError: The columns are invalid.
    """
    present = {standard: name for standard, name in renames.items() if name in names}
    return standardize_columns(url, names, present)


def check_renames_used(url: str, unseen: set[str]) -> None:
    """Check, after the last row, that every renamed column appeared in some row.

    Raises:
        ManifestError: A renamed column did not appear.
    """
    if unseen:
        raise ManifestError(
            f"No row of {url} has a column {', '.join(sorted(unseen))}, which --columns names."
        )


def _read_text_lines(url: str, *, line_ends_at_cr: bool, is_limited: bool = True) -> Iterator[str]:
    """Yield the lines of a file, with their line ends; without a limit, long lines in pieces.

    Bytes that are not UTF-8 become surrogates, so that the caller can name their line.

    Raises:
        ManifestError: A line is too long, or the file is a decompression bomb.
        Exception: What the filesystem or the decoder raises.
    """
    _, compression = detect_format(url)
    with open_source(url) as (stored, _):
        size = _measure_size(stored)
        with (
            decompress(stored, compression, url) as data,
            io.TextIOWrapper(
                data,
                encoding="utf-8-sig",
                errors="surrogateescape",
                newline="" if line_ends_at_cr else "\n",
            ) as text,
        ):
            number = read = cells = 0
            while line := text.readline(MAX_LINE_CHARACTERS + 1):
                number += 1
                read += len(line)
                if is_limited:
                    _check_line_length(line, number, url)
                if compression and read > _BOMB_MIN_CHARACTERS and read > _BOMB_RATIO * size:
                    raise ManifestError(
                        f"The manifest {url} has {size:,} bytes and decompresses to more than "
                        f"{_BOMB_MIN_CHARACTERS:,} characters and {_BOMB_RATIO} times its size; "
                        "decompress it first."
                    )
                if compression:
                    cells += 1 + sum(map(line.count, DELIMITERS.values()))
                    check_cells(cells, size, url)
                yield line


def _check_line_length(line: str, number: int, url: str) -> None:
    if len(line) > MAX_LINE_CHARACTERS:
        raise ManifestError(
            f"Line {number} of {url} has more than {MAX_LINE_CHARACTERS:,} characters; shorten it."
        )


def _measure_size(stored: Any) -> int:
    size = stored.seek(0, io.SEEK_END)
    stored.seek(0)
    return int(size)


def _find_width_problem(columns: list[str], width: int, values: list[str]) -> str | None:
    if len(values) == len(columns):
        return None
    surplus = sum(1 for text in values[len(columns) :] if text.strip())
    if surplus:
        cells = "1 more cell" if surplus == 1 else f"{surplus:,} more cells"
        return f"the row has {cells} than columns; quote cells that contain commas"
    if len(values) < width:
        return f"the row has {len(values):,} of {width:,} cells; add the missing ones"
    return None


def _check_encoding(values: list[str], line: int, url: str) -> str:
    """Return the text of a row's cells, in which no character is half of one."""
    text = "".join(values)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ManifestError(
                f"Line {line} of {url} is not UTF-8; save the manifest as UTF-8 (it may be in "
                "UTF-16 or Windows-1252)."
            ) from None
    return text


def _parse_object(text: str) -> dict[str, Any]:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("not UTF-8") from None
    values = json.loads(text, object_pairs_hook=_build_object, parse_constant=_refuse_constant)
    if not isinstance(values, dict):
        raise ValueError(f"expected an object, got {type(values).__name__} {text[:40]!r}")  # noqa: TRY004
    return values


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_COLUMNS:
        raise ValueError(f"an object has {len(pairs):,} names; the limit is {MAX_COLUMNS:,}")
    values = dict(pairs)
    if len(values) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        repeated = sorted(name for name, count in counts.items() if count > 1)
        raise ValueError(f"duplicate name {', '.join(repeated)[:100]}")
    return values


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not valid JSON")


def _explain_error(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "the line is nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"the line is not valid JSON: {error.msg} at character {error.colno}"
    if "integer string conversion" in str(error):
        return "the line contains a number with thousands of digits"
    return f"the line is invalid: {str(error)[:200]}"
