"""Read an image's size and format from its header, so that nothing is decoded.

A decompression bomb can be rejected before a decoder sees it.
"""

from __future__ import annotations

import contextlib
import re
import struct
from typing import TYPE_CHECKING

from PIL import ExifTags, Image

if TYPE_CHECKING:
    from prefect_flux_kontext.images.decode import ImageFormat

# The name of a WebP's first chunk.
_WEBP_CHUNK = slice(12, 16)

# JPEG markers that hold a size, and those without content.
_JPEG_SIZE_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# A marker that begins a segment; in the data of a scan, 0xFF is followed by 0 or a restart marker.
_JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")
# Encoders write at most some twenty scans, and chunks of 4 kB or more.
_MAX_JPEG_SCANS = 100
_MAX_PARTS = 20_000
_JPEG_STANDALONE_MARKERS = frozenset({0x01, *range(0xD0, 0xD9)})

_MAX_SEGMENT_BYTES = 65_535

# A quarter turn to the left or right, mirrored or not.
_SIDEWAYS_ORIENTATIONS = range(5, 9)


def read_size(data: bytes) -> tuple[int, int] | None:
    """Return width and height in pixels of a JPEG, PNG or WebP; None if the header has none."""
    try:
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            width, height = struct.unpack_from(">II", data, 16)
            return width, height
        if data.startswith(b"\xff\xd8"):
            return _read_jpeg_size(data)
        if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            return _read_webp_size(data)
    except (struct.error, IndexError):
        pass
    return None


def find_slow_structure(data: bytes) -> str | None:
    """Return why an image would take long to decode although it is small, or None.

    Each scan of a progressive JPEG touches the whole image, and each segment or chunk takes time,
    however few bytes it has.
    """
    if data.startswith(b"\xff\xd8"):
        scans, segments = _count_jpeg_parts(data)
        if scans > _MAX_JPEG_SCANS:
            return f"it has more than {_MAX_JPEG_SCANS} scans"
        return f"it has more than {_MAX_PARTS:,} segments" if segments > _MAX_PARTS else None
    if data.startswith(b"\x89PNG") and _count_png_chunks(data) > _MAX_PARTS:
        return f"it has more than {_MAX_PARTS:,} chunks"
    return None


def _count_jpeg_parts(data: bytes) -> tuple[int, int]:
    """Count scans and segments up to just above their limits."""
    scans = segments = 0
    at = 2
    while scans <= _MAX_JPEG_SCANS and segments <= _MAX_PARTS:
        found = _JPEG_MARKER.search(data, at)
        if found is None or found[1] == b"\xd9":
            break
        segments += 1
        scans += found[1] == b"\xda"
        length = int.from_bytes(data[found.end() : found.end() + 2], "big")
        at = found.end() + max(length, 2)
    return scans, segments


def _count_png_chunks(data: bytes) -> int:
    """Count chunks up to just above their limit."""
    at, chunks = 8, 0
    while at < len(data) and chunks <= _MAX_PARTS:
        chunks += 1
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    return chunks


def read_displayed_size(data: bytes) -> tuple[int, int] | None:
    """Return width and height as viewers show an image, or None if the header has no size.

    A photograph of a phone may lie on its side, and a viewer turns it as its EXIF data says. Only
    the EXIF data of a JPEG is in its header.
    """
    size = read_size(data)
    if size and data.startswith(b"\xff\xd8") and (at := data.find(b"Exif\0\0")) > 0:
        exif = Image.Exif()
        with contextlib.suppress(Exception):  # damaged EXIF data raises errors of many types
            exif.load(data[at : at + _MAX_SEGMENT_BYTES])
            if exif.get(ExifTags.Base.Orientation) in _SIDEWAYS_ORIENTATIONS:
                return size[1], size[0]
    return size


def read_format(data: bytes) -> ImageFormat:
    """Return the format of an image that is known to be a JPEG, PNG or WebP."""
    if data.startswith(b"\xff\xd8"):
        return "jpeg"
    return "png" if data.startswith(b"\x89PNG") else "webp"


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
