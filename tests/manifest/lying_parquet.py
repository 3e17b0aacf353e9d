"""Parquet files that lie, written by hand: no library writes them.

A struct of Thrift's compact protocol is a dict of field numbers; see the Parquet format.
"""

import itertools
import struct

import zstandard

PLAIN, DELTA_BYTE_ARRAY, DICTIONARY = 0, 7, 8
_DATA_PAGE, _DICTIONARY_PAGE = 0, 2
_ZSTD = 6


class Long(int):
    """A number of 64 bits; others have 32."""


def varint(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def zigzag(value):
    return varint(value * 2 if value >= 0 else -value * 2 - 1)


def encode(value):
    """Return the type of a value and its bytes."""
    match value:
        case Long():
            return 6, zigzag(value)
        case int():
            return 5, zigzag(value)
        case bytes():
            return 8, varint(len(value)) + value
        case list():
            items = b"".join(encode(item)[1] for item in value)
            return 9, bytes([0xF0 | encode(value[0])[0]]) + varint(len(value)) + items
    out, last = b"", 0
    for number, field in value.items():
        kind, data = encode(field)
        out, last = out + bytes([number - last << 4 | kind]) + data, number
    return 12, out + b"\0"


def page(data, values, encoding=PLAIN, *, is_dictionary=False, size=None):
    """Return a page with zstd, which may lie about the size that it is unpacked to."""
    packed = zstandard.ZstdCompressor(level=1).compress(data)
    header = {
        1: _DICTIONARY_PAGE if is_dictionary else _DATA_PAGE,
        2: len(data) if size is None else size,
        3: len(packed),
    }
    if is_dictionary:
        header[7] = {1: values, 2: encoding}
    else:
        header[5] = {1: values, 2: encoding, 3: 3, 4: 3}
    return encode(header)[1] + packed


def parquet_file(pages, rows, *, groups=1, deep=0, chunks=1, more_rows=0):
    """Return a file with a column `prompt` whose row groups all have the same pages."""
    places = [4 + place for place in itertools.accumulate(map(len, pages[:-1]), initial=0)]
    column = {1: 6, 2: [PLAIN, DICTIONARY], 3: [b"prompt"], 4: _ZSTD, 5: Long(rows + more_rows)}
    column |= {6: Long(100), 7: Long(sum(map(len, pages))), 9: Long(places[-1])}
    if len(places) > 1:
        column[11] = Long(places[0])
    chunk = {2: Long(0), 3: column}
    group = {
        1: [chunk] if chunks == 1 else [{2: Long(0)}] * chunks,
        2: Long(100),
        3: Long(rows + more_rows),
    }
    leaf = {1: 6, 3: 1, 4: b"prompt", 6: 0}
    schema = [{4: b"schema", 5: 1}, *[{3: 1, 4: b"prompt", 5: 1}] * deep, leaf]
    footer = encode({1: 1, 2: schema, 3: Long((rows + more_rows) * groups), 4: [group] * groups})[
        1
    ]
    return b"PAR1%b%b%bPAR1" % (b"".join(pages), footer, struct.pack("<I", len(footer)))


def defined(values):
    """Return the levels that say that no value is null."""
    run = varint(values << 1) + b"\1"
    return struct.pack("<I", len(run)) + run


def text(length):
    return struct.pack("<I", length) + b"x" * length


def long_dictionary(length, rows=1_000):
    indexes = defined(rows) + b"\1" + varint(rows << 1) + b"\0"
    return [page(text(length), 1, is_dictionary=True), page(indexes, rows, DICTIONARY)]


def long_texts(length, count=1):
    return [page(defined(count) + text(length) * count, count)]


def distinct_texts(length, rows):
    """Texts of which each has all but the last character in common with the one before it."""
    texts = b"x" * (length + 1) + bytes(97 + number % 26 for number in range(rows - 1))
    prefixes, suffixes = _packed(0, length, rows), _packed(length + 1, 1, rows)
    return [page(defined(rows) + prefixes + suffixes + texts, rows, DELTA_BYTE_ARRAY)]


def _packed(first, others, count):
    """Encode numbers that are equal but for the first one (DELTA_BINARY_PACKED)."""
    step = others - first
    least, width = min(step, 0), abs(step).bit_length()
    steps = [step - least] + [-least] * 127
    bits = sum(each << number * width for number, each in enumerate(steps))
    block = zigzag(least) + bytes([width] * 4) + bits.to_bytes(width * 16, "little")
    rest = (zigzag(0) + bytes(4)) * ((count - 2) // 128)
    return varint(128) + varint(4) + varint(count) + zigzag(first) + block + rest
