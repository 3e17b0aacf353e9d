"""Opening a manifest's file on any fsspec filesystem, and its lines, never longer than allowed."""

from __future__ import annotations

import csv
import io
import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import fsspec
import fsspec.compression

from prefect_flux_kontext.errors import ManifestError
from prefect_flux_kontext.manifest.columns import (
    LONGEST_CELL,
    Columns,
    Line,
    find_cell_problem,
    to_cells,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_LONGEST_LINE = 1_000_000
_CHUNK = 65_536
_COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
_BOMB_FROM = 2**30
_BOMB_RATIO = 200
"""A gigabyte, and two hundred times what the file has: no table that people write is like that."""


def detect_format(url: str) -> tuple[str, str | None]:
    """The file's name extension in small letters, and how it is compressed.

    `m.csv.gz` is `(".csv", "gzip")`. A web address is judged by its path alone.
    """
    path = urlsplit(url).path if url.lower().startswith(("http://", "https://")) else url
    name = path.replace("\\", "/").rsplit("/", 1)[-1].lower()
    compression = None
    for ending, known in _COMPRESSED.items():
        if name.endswith(ending):
            name, compression = name.removesuffix(ending), known
    dot = name.rfind(".")
    return (name[dot:] if dot > 0 else ""), compression


@contextmanager
def as_manifest_error(url: str) -> Iterator[None]:
    """Turn whatever a filesystem or decoder raises into an error that names the manifest.

    Raises:
        ManifestError: Instead of every other error.
    """
    try:
        yield
    except ManifestError:
        raise
    except FileNotFoundError:
        raise ManifestError(f"There is no manifest at {url}.") from None
    except PermissionError as error:
        raise ManifestError(f"The manifest {url} may not be read: {error}") from None
    except Exception as error:  # noqa: BLE001 - each filesystem has errors of its own
        told = str(error) or type(error).__name__
        raise ManifestError(f"The manifest {url} cannot be read: {told}") from None


def text_lines(url: str, *, line_ends_at_cr: bool) -> Iterator[str]:
    """The lines of a file, with their ends.

    What is not UTF-8 becomes surrogates, so that the line it is on can be told.

    Raises:
        ManifestError: A line is too long, or so much comes out of little that it is a trap.
        Exception: What the filesystem or the decoder raises.
    """
    _, compression = detect_format(url)
    with fsspec.open(url, "rb") as stored:
        size = _size(stored)
        with (
            _decompressed(stored, compression, url) as data,
            io.TextIOWrapper(
                data,
                encoding="utf-8-sig",
                errors="surrogateescape",
                newline="" if line_ends_at_cr else "\n",
            ) as text,
        ):
            number = read = 0
            while line := text.readline(_LONGEST_LINE + 1):
                number += 1
                read += len(line)
                if len(line) > _LONGEST_LINE:
                    raise ManifestError(
                        f"Line {number} of {url} has more than {_LONGEST_LINE:,} characters."
                    )
                if compression and read > _BOMB_FROM and read > _BOMB_RATIO * size:
                    raise ManifestError(
                        f"The manifest {url} has {size:,} bytes and unpacks to more than "
                        f"{_BOMB_RATIO} times that and a gigabyte; give it unpacked."
                    )
                yield line


def _size(stored: Any) -> int:
    at = stored.seek(0, io.SEEK_END)
    stored.seek(0)
    return int(at)


@contextmanager
def _decompressed(stored: Any, compression: str | None, url: str) -> Iterator[Any]:
    if compression is None:
        yield stored
    elif compression == "zstd":
        with io.BufferedReader(_Zstandard(stored, url), _CHUNK) as data:
            yield data
    else:
        with fsspec.compression.compr[compression](stored, mode="rb") as data:
            yield data


class _Zstandard(io.RawIOBase):
    """Unlike the library's own reader it reads all frames, and says when the last is cut off."""

    def __init__(self, stored: Any, url: str) -> None:
        try:
            import zstandard  # noqa: PLC0415 - an extra
        except ImportError:
            raise ManifestError(
                f"To read {url}, install `prefect-flux-kontext[zstd]`, or give it unpacked."
            ) from None
        self._stored = stored
        # More than this much window is refused: it would be held in memory.
        self._new = zstandard.ZstdDecompressor(max_window_size=2**27).decompressobj
        self._frame = self._new()
        self._ready = b""
        self._begun = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._begun = self._new(), False
            packed = packed or self._stored.read(4_096)
            if not packed:
                if self._begun:
                    raise EOFError("the compressed file is cut off")
                return 0
            self._begun = True
            self._ready = self._frame.decompress(packed)
        part, self._ready = self._ready[: len(buffer)], self._ready[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)


def read_delimited(url: str, renamed: Mapping[str, str], delimiter: str) -> Iterator[Line]:
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
                yield Line(
                    number, cells, _ragged(columns, named, values) or find_cell_problem(cells)
                )
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


_SHAPES = 1_000


def read_json_lines(url: str, renamed: Mapping[str, str]) -> Iterator[Line]:
    """The objects of a JSON Lines file in UTF-8, read as they are asked for.

    A line that is no object is a row that is refused: the others can be told from it.

    Raises:
        ManifestError: It is no JSON Lines file.
        Exception: What the filesystem or the decoder raises.
    """
    names: dict[tuple[str, ...], list[str]] = {}
    unseen = set(renamed.values())
    for number, line in enumerate(text_lines(url, line_ends_at_cr=False), start=1):
        text = line.strip()
        if not text:
            continue
        if number == 1 and text in ("[", "{", "[{"):
            raise ManifestError(
                f"The manifest {url} is JSON over several lines; write one object on each line."
            )
        if number == 1 and text.startswith(("<", "\udcff", "\udcfe")):
            raise ManifestError(
                f"The manifest {url} is not JSON Lines in UTF-8; it starts with {text[:30]!r}."
            )
        try:
            values = _object(text)
        except (ValueError, RecursionError) as error:
            yield Line(number, {}, _told(error))
            continue
        shape = tuple(values)
        if shape not in names:
            unseen.difference_update(shape)
            if len(names) == _SHAPES:
                names.clear()
            try:
                names[shape] = columns_of_object(url, shape, renamed)
            except ManifestError as error:
                yield Line(number, {}, error.message.rstrip("."))
                continue
        cells, problem = to_cells(dict(zip(names[shape], values.values(), strict=True)))
        yield Line(number, cells, problem)
    check_seen(url, unseen)


def columns_of_object(url: str, names: Sequence[str], renamed: Mapping[str, str]) -> list[str]:
    """The columns of one object, which may leave out what it will.

    Raises:
        ManifestError: They are no manifest's.
    """
    present = {meant: name for meant, name in renamed.items() if name in names}
    return Columns(url, names, present).names


def check_seen(url: str, unseen: set[str]) -> None:
    """After the last row: a column to be taken as another that stood nowhere is a mistake.

    Raises:
        ManifestError: There is such a column.
    """
    if unseen:
        raise ManifestError(f"No row of {url} has {sorted(unseen)}, which --columns names.")


def _object(text: str) -> dict[str, Any]:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("it is not in UTF-8") from None
    values = json.loads(text, object_pairs_hook=_without_twins, parse_constant=_no_constant)
    if not isinstance(values, dict):
        raise ValueError(f"it is not an object but {type(values).__name__} {text[:40]!r}")  # noqa: TRY004
    return values


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"it names {', '.join(twice)[:100]} twice")
    return made


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _told(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "the line is nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"the line is not JSON: {error.msg} at character {error.colno}"
    if "integer string conversion" in str(error):
        return "the line holds a number of thousands of digits"
    return f"the line cannot be taken: {str(error)[:200]}"
