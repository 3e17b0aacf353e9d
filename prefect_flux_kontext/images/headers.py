"""Read an image's size, format and end from its structure, so that nothing is decoded.

A decompression bomb can be rejected before a decoder sees it.
"""

from __future__ import annotations

import re
import struct
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefect_flux_kontext.images.decode import ImageFormat

# The name of a WebP's first chunk.
_WEBP_CHUNK = slice(12, 16)

# JPEG markers that hold a size, and those without content.
_JPEG_SIZE_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_STANDALONE_MARKERS = frozenset({0x01, *range(0xD0, 0xD9)})
_JPEG_END = 0xD9
# The next marker in the data of a scan, where FF00 is a byte and FFD0 to FFD7 restart the decoder.
_JPEG_NEXT_MARKER = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")

# Less than the 1 MB of unpacked metadata that Pillow allows.
_MAX_PROFILE_BYTES = 1_000_000

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def read_size(data: bytes) -> tuple[int, int] | None:
    """Return width and height in pixels of a JPEG, PNG or WebP; None if the header has none."""
    try:
        if data.startswith(_PNG_SIGNATURE):
            width, height = struct.unpack_from(">II", data, 16)
            return width, height
        if data.startswith(b"\xff\xd8"):
            return _read_jpeg_size(data)
        if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            return _read_webp_size(data)
    except (struct.error, IndexError):
        pass
    return None


def read_format(data: bytes) -> ImageFormat:
    """Return the format of an image that is known to be a JPEG, PNG or WebP."""
    if data.startswith(b"\xff\xd8"):
        return "jpeg"
    return "png" if data.startswith(b"\x89PNG") else "webp"


def cut_to_image(data: bytes) -> bytes | None:
    """Return the image that a file holds, without what follows its end.

    A PNG comes without texts and without a profile that is too large, which Pillow would refuse.

    Returns:
        The bytes that a decoder needs; None if the image does not reach its end.
    """
    try:
        if data.startswith(b"\xff\xd8"):
            return data[: _find_jpeg_end(data, 0)]
        if data.startswith(_PNG_SIGNATURE):
            return _cut_png(data)
    except (struct.error, IndexError):
        return None
    end = int.from_bytes(data[4:8], "little") + 8
    return data[:end] if end <= len(data) else None


def has_whole_jpegs(data: bytes) -> bool:
    """Return whether all pictures of an MPO, which follow each other, reach their end."""
    at = 0
    try:
        while data.startswith(b"\xff\xd8", at):
            at = _find_jpeg_end(data, at)
    except (struct.error, IndexError):
        return False
    return True


def _find_jpeg_end(data: bytes, start: int) -> int:
    """Return where a JPEG ends, by its end marker. The thumbnail in its metadata has one too.

    Raises:
        IndexError: The image does not reach its end.
        struct.error: Likewise.
    """
    at = start + 2
    while found := _JPEG_NEXT_MARKER.search(data, at):
        marker, at = data[found.end() - 1], found.end()
        if marker == _JPEG_END:
            return at
        if marker not in _JPEG_STANDALONE_MARKERS:
            at += struct.unpack_from(">H", data, at)[0]
    raise IndexError("no end marker")


def _cut_png(data: bytes) -> bytes | None:
    at, kept = len(_PNG_SIGNATURE), [_PNG_SIGNATURE]
    while True:
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + length + 12
        if end > len(data):
            return None
        # The name of a chunk that decoders must read starts with a capital.
        is_needed = kind[:1].isupper() or kind in (b"tRNS", b"eXIf")
        if is_needed or (kind == b"iCCP" and _is_small_profile(data[at + 8 : end - 4])):
            kept.append(data[at:end])
        if kind == b"IEND":
            return b"".join(kept)
        at = end


def _is_small_profile(chunk: bytes) -> bool:
    unpacker = zlib.decompressobj()
    try:
        unpacker.decompress(chunk.partition(b"\0")[2][1:], _MAX_PROFILE_BYTES)
    except zlib.error:
        return False
    return not unpacker.unconsumed_tail


def _read_jpeg_size(data: bytes) -> tuple[int, int] | None:
    at = 2
    while True:
        while data[at] != 0xFF:  # noqa: PLR2004 - the first byte of every marker
            at += 1
        while data[at] == 0xFF:  # noqa: PLR2004
            at += 1
        marker = data[at]
        at += 1
        if marker in _JPEG_SIZE_MARKERS:
            height, width = struct.unpack_from(">HH", data, at + 3)
            return width, height
        if marker not in _JPEG_STANDALONE_MARKERS:
            at += struct.unpack_from(">H", data, at)[0]


def _read_webp_size(data: bytes) -> tuple[int, int] | None:
    chunk = data[_WEBP_CHUNK]
    if chunk == b"VP8X":
        width, height = data[24:27], data[27:30]
        return int.from_bytes(width, "little") + 1, int.from_bytes(height, "little") + 1
    if chunk == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if chunk == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    return None
