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

import fsspec.compression

from prefect_flux_kontext.errors import ManifestError
from prefect_flux_kontext.manifest.columns import (
    COLUMNS,
    MAX_BLANK_ROWS,
    MAX_CELL_CHARACTERS,
    MAX_COLUMNS,
    Columns,
    Line,
    find_cell_problem,
    to_cells,
)
from prefect_flux_kontext.references.remote import open_source

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_MAX_LINE_CHARACTERS = 1_000_000
_ZSTD_BUFFER_BYTES = 65_536
# Four bytes can make a block of 128 kB, so this bounds what one read decompresses to 16 MB.
_ZSTD_READ_BYTES = 512
# A larger window is refused, because zstd would hold it in memory.
_ZSTD_MAX_WINDOW_BYTES = 2**27
_COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
# A file that exceeds both limits is a decompression bomb: no real table compresses that well.
_BOMB_MIN_CHARACTERS = 2**26
_BOMB_RATIO = 200
# Reading 4,000,000 cells takes some 3 s, and a small file can have any number of empty ones.
_MAX_CELLS = 3_000_000
_MAX_CELLS_A_BYTE = 4
_CHUNK_BYTES = 2**20
# The first line by which a file names its delimiter to Excel.
_SEPARATOR_LINE = re.compile(r"sep=([,;\t])", re.IGNORECASE)
# The text of a JSON file that is looked at together.
_PIECE_CHARACTERS = 65_536
_JSON_VALUE = re.compile(r"[^\s,]")
# Finds where values end. Their numbers are read later, so long ones cost no time here.
_JSON_DECODER = json.JSONDecoder(parse_int=str, parse_float=str)
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
        with _decompress(stored, compression, url) as data:
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
            if row_characters > _MAX_LINE_CHARACTERS:
                raise ManifestError(
                    f"The row that starts on line {first_line + lines_before} of {url} has more "
                    f"than {_MAX_LINE_CHARACTERS:,} characters; it may have a quote that is never "
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
        columns = Columns(url, header, renames).names
        has_line_feeds = line.endswith("\n")
        width = max(number for number, name in enumerate(columns, start=1) if name)
        first_line = reader.line_num + 1
        for values in reader:
            number = reader.line_num + lines_before
            _check_encoding(values, number, url)
            row_characters = 0
            # Spreadsheets end a table with empty rows and columns.
            if any(text.strip() for text in values):
                cells = dict(zip(columns, values, strict=False))
                problem = _find_width_problem(columns, width, values)
                if has_line_feeds and line.endswith("\r"):
                    # Another program would read one cell here, of which this is the beginning.
                    problem = "the row ends with a carriage return alone; quote the cell with it"
                yield Line(number, cells, problem or find_cell_problem(cells))
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
        yield from _split_values(lines, url, number)
        return
    for place, line in enumerate(lines, number):
        _check_line_length(line, place, url)
        yield place, line


def _split_values(pieces: Iterator[str], url: str, line: int) -> Iterator[tuple[int, str]]:
    """Yield the values of a JSON array, or of JSON values one after another.

    A value is numbered by the line that it ends on, or by its place if that is higher. Memory is
    bounded by the limit for a line, which each value has to keep.

    Args:
        pieces: The text.
        url: The manifest, for messages.
        line: The line on which the text starts.
    """
    text = _take(pieces, _PIECE_CHARACTERS).lstrip()
    is_array = text.startswith("[")
    at, number = int(is_array), line - 1
    while True:
        start, found = at, _JSON_VALUE.search(text, at)
        at = found.start() if found else len(text)
        line += text.count("\n", start, at)
        if is_array and text.startswith("]", at):
            if any(map(str.strip, itertools.chain([text[at + 1 :]], pieces))):
                raise ManifestError(f"The manifest {url} goes on after its JSON array.")
            return
        end, problem = _find_value_end(text, at)
        # The end of the text may be in the middle of a value.
        if end in (None, len(text)) and (
            more := _take(pieces, max(_PIECE_CHARACTERS, len(text) - at))
        ):
            if len(text) - at > _MAX_LINE_CHARACTERS:
                raise ManifestError(
                    f"The value that starts on line {line} of {url} is not valid JSON, or has "
                    f"more than {_MAX_LINE_CHARACTERS:,} characters."
                )
            text, at = text[at:] + more, 0
            continue
        if at == len(text) and not is_array:
            return
        if end is None:
            problem = (
                problem if at < len(text) else "the array has no end; the file may be cut off"
            )
            raise ManifestError(f"Line {line} of {url} is not valid JSON: {problem}.")
        line += text.count("\n", at, end)
        number = max(number + 1, line)
        yield number, text[at:end]
        at = end


def _find_value_end(text: str, at: int) -> tuple[int | None, str]:
    """Return where the JSON value that starts at a position ends, or None and why it does not."""
    try:
        return _JSON_DECODER.raw_decode(text, at)[1], ""
    except json.JSONDecodeError as error:
        return None, error.msg
    except RecursionError:
        return None, "it is nested too deeply"


def _take(pieces: Iterator[str], characters: int) -> str:
    """Return the next pieces of a text, with at least this many characters if there are."""
    taken, size = [], 0
    for piece in pieces:
        taken.append(piece)
        size += len(piece)
        if size >= characters:
            break
    return "".join(taken)


def resolve_columns(url: str, names: Sequence[str], renames: Mapping[str, str]) -> list[str]:
    """Return the standard column names of one object, which may omit renamed columns.

    Raises:
        ManifestError: The columns are invalid.
    """
    present = {standard: name for standard, name in renames.items() if name in names}
    return Columns(url, names, present).names


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
            _decompress(stored, compression, url) as data,
            io.TextIOWrapper(
                data,
                encoding="utf-8-sig",
                errors="surrogateescape",
                newline="" if line_ends_at_cr else "\n",
            ) as text,
        ):
            number = read = cells = 0
            while line := text.readline(_MAX_LINE_CHARACTERS + 1):
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
    if len(line) > _MAX_LINE_CHARACTERS:
        raise ManifestError(
            f"Line {number} of {url} has more than {_MAX_LINE_CHARACTERS:,} characters; shorten "
            "it."
        )


def _measure_size(stored: Any) -> int:
    size = stored.seek(0, io.SEEK_END)
    stored.seek(0)
    return int(size)


@contextmanager
def _decompress(stored: Any, compression: str | None, url: str) -> Iterator[Any]:
    if compression is None:
        yield stored
    elif compression == "zstd":
        with io.BufferedReader(_ZstandardReader(stored, url), _ZSTD_BUFFER_BYTES) as data:
            yield data
    else:
        with fsspec.compression.compr[compression](stored, mode="rb") as data:
            yield data


class _ZstandardReader(io.RawIOBase):
    """Zstandard reader that reads all frames and raises EOFError when the last one is truncated.

    The library's own reader does neither.
    """

    def __init__(self, stored: Any, url: str) -> None:
        try:
            import zstandard  # noqa: PLC0415 - an extra
        except ImportError:
            raise ManifestError(
                f"To read {url}, install `prefect-flux-kontext[zstd]`, or decompress it first."
            ) from None
        self._stored = stored
        decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_MAX_WINDOW_BYTES)
        self._new_frame = decompressor.decompressobj
        self._frame = self._new_frame()
        self._ready = memoryview(b"")
        self._is_inside_frame = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._is_inside_frame = self._new_frame(), False
            packed = packed or self._stored.read(_ZSTD_READ_BYTES)
            if not packed:
                if self._is_inside_frame:
                    raise EOFError("the compressed file is truncated")
                return 0
            self._is_inside_frame = True
            self._ready = memoryview(self._frame.decompress(packed))
        chunk, self._ready = self._ready[: len(buffer)], self._ready[len(buffer) :]
        buffer[: len(chunk)] = chunk
        return len(chunk)


def _find_width_problem(columns: list[str], width: int, values: list[str]) -> str | None:
    surplus = sum(1 for text in values[len(columns) :] if text.strip())
    if surplus:
        cells = "1 more cell" if surplus == 1 else f"{surplus:,} more cells"
        return f"the row has {cells} than columns; quote cells that contain commas"
    if len(values) < width:
        return f"the row has {len(values):,} of {width:,} cells; add the missing ones"
    return None


def _check_encoding(values: list[str], line: int, url: str) -> None:
    text = "".join(values)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ManifestError(
                f"Line {line} of {url} is not UTF-8; save the manifest as UTF-8 (it may be in "
                "UTF-16 or Windows-1252)."
            ) from None


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
