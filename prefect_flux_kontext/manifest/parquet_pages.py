"""What a Parquet file takes to read, by the headers of its pages: its footer may say anything.

Footer and headers are in Thrift's compact protocol.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, NamedTuple

# A header has some 50 bytes, unless it holds statistics of long texts.
_HEADER_BYTES = (256, 2**13, 2**20)
_FOOTER_END_BYTES = 8
_MAX_DEPTH = 16
# Each takes more than 1 kB in Arrow. A hundred row groups of a hundred columns have 30,000.
_MAX_FOOTER_ITEMS = 50_000

_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)

_BITS = {_I16: 16, _I32: 32, _I64: 64}
_MAX_SHIFT = 63
_DAMAGED = "its footer or the header of a page is damaged"

_DICTIONARY_PAGE = 2
# Number of the field with the details of a kind of page, and of the encoding in it.
_DETAILS = {0: (5, 2), _DICTIONARY_PAGE: (7, 2), 3: (8, 4)}

DELTA_LENGTH_BYTE_ARRAY = 6
DELTA_BYTE_ARRAY = 7
"""The encoding in which each text repeats the start of the one before it."""


class Page(NamedTuple):
    """A page of a column."""

    stored: int  # bytes in the file, with its header
    size: int  # bytes that it is unpacked to
    values: int  # number of values, 0 for a dictionary page
    encoding: int  # number of the encoding


def check_footer(file: Any) -> None:
    """Check that a footer is small enough for Arrow to read it.

    Raises:
        ValueError: It is not, or is damaged.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - _FOOTER_END_BYTES))
    end = file.read(_FOOTER_END_BYTES)
    length = int.from_bytes(end[:4], "little")
    if end[4:] != b"PAR1" or length > size - _FOOTER_END_BYTES:
        raise ValueError("it is not a Parquet file, or is truncated")
    file.seek(size - _FOOTER_END_BYTES - length)
    try:
        _Reader(file.read(length)).read_struct()
    except IndexError:
        raise ValueError(_DAMAGED) from None


def read_pages(file: Any, chunk: Any) -> Iterator[Page]:
    """Yield the pages that Arrow reads for a column chunk, given pyarrow's metadata of it.

    Raises:
        ValueError: A header is damaged.
    """
    start = chunk.data_page_offset
    if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < start:
        start = chunk.dictionary_page_offset
    end, left = start + chunk.total_compressed_size, chunk.num_values
    while left > 0 and start < end:
        page = _read_page(file, start)
        start += page.stored
        left -= page.values
        yield page


def _read_page(file: Any, start: int) -> Page:
    for limit in _HEADER_BYTES:
        file.seek(start)
        reader = _Reader(file.read(limit))
        try:
            header = reader.read_struct()
            break
        except IndexError:
            continue
    else:
        raise ValueError(_DAMAGED)
    kind, size, packed = (header.get((number, _I32), -1) for number in (1, 2, 3))
    field, encoding = _DETAILS.get(kind, (0, 0))
    details = header.get((field, _STRUCT), {})
    values = details.get((1, _I32), 0)
    if min(size, packed, values) < 0:
        raise ValueError(_DAMAGED)
    return Page(
        reader.position + packed,
        size,
        0 if kind == _DICTIONARY_PAGE else values,
        details.get((encoding, _I32), 0),
    )


class _Reader:
    """Reads structs, and keeps their numbers and structs only.

    An IndexError says that the data ends too early.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.position = 0
        self._items = 0

    def read_struct(self, depth: int = 0) -> dict[tuple[int, int], Any]:
        """Return the fields by number and type: Arrow skips a field of another type."""
        fields: dict[tuple[int, int], Any] = {}
        number = 0
        while head := self._read_byte():
            number = number + (head >> 4) if head >> 4 else self._read_number(16)
            fields[number, head & 15] = self._read_value(head & 15, depth + 1)
        return fields

    def _read_value(self, kind: int, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise ValueError(_DAMAGED)
        if kind in _BITS:
            return self._read_number(_BITS[kind])
        if kind == _STRUCT:
            return self.read_struct(depth)
        if kind in (_LIST, _SET):
            self._skip_list(depth)
        elif kind == _BINARY:
            self._skip(self._read_varint())
        elif kind == _DOUBLE:
            self._skip(8)
        elif kind == _BYTE:
            self._skip(1)
        elif kind not in (_TRUE, _FALSE):  # nor are there maps
            raise ValueError(_DAMAGED)
        return None

    def _skip_list(self, depth: int) -> None:
        head = self._read_byte()
        kind, size = head & 15, head >> 4
        if size == 15:  # noqa: PLR2004 - the size follows
            size = self._read_varint()
        if kind == _STRUCT:
            self._items += size
            if self._items > _MAX_FOOTER_ITEMS:
                raise ValueError(
                    f"its footer has more than {_MAX_FOOTER_ITEMS:,} entries; write it with fewer "
                    "columns and larger row groups"
                )
        for _ in range(size):
            if kind in (_TRUE, _FALSE):
                self._skip(1)
            else:
                self._read_value(kind, depth + 1)

    def _skip(self, size: int) -> None:
        self.position += size
        if self.position > len(self._data):
            raise IndexError

    def _read_byte(self) -> int:
        byte = self._data[self.position]
        self.position += 1
        return byte

    def _read_varint(self) -> int:
        value = shift = 0
        while (byte := self._read_byte()) > 127:  # noqa: PLR2004 - more bytes follow
            value |= (byte & 127) << shift
            shift += 7
            if shift > _MAX_SHIFT:
                raise ValueError(_DAMAGED)
        return value | byte << shift

    def _read_number(self, bits: int) -> int:
        value = self._read_varint()
        if value >> bits:  # Arrow would take the lowest bits
            raise ValueError(_DAMAGED)
        return value >> 1 ^ -(value & 1)
