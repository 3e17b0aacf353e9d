"""Read format and size from an image's header, without decoding it."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefect_flux_kontext.images.decode import ImageFormat

_WEBP_KIND = slice(12, 16)
# Start-of-frame markers hold the size; the three left out have other meanings.
_JPEG_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_MARKERS_WITHOUT_CONTENT = frozenset({0x01, *range(0xD0, 0xD9)})


def read_size(data: bytes) -> tuple[int, int] | None:
    """Return width and height in pixels of a JPEG, PNG or WebP, or None if not found."""
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
        if marker in _JPEG_FRAME_MARKERS:
            height, width = struct.unpack_from(">HH", data, at + 3)
            return width, height
        if marker not in _JPEG_MARKERS_WITHOUT_CONTENT:
            at += struct.unpack_from(">H", data, at)[0]


def _read_webp_size(data: bytes) -> tuple[int, int] | None:
    kind = data[_WEBP_KIND]
    if kind == b"VP8X":
        width, height = data[24:27], data[27:30]
        return int.from_bytes(width, "little") + 1, int.from_bytes(height, "little") + 1
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    return None
