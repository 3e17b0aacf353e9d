"""Read an image's size, format and end from its markers, so that nothing is decoded.

A decompression bomb can be rejected before a decoder sees it.
"""

from __future__ import annotations

import contextlib
import re
import struct
import zlib
from typing import TYPE_CHECKING

from PIL import ExifTags, Image

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prefect_flux_kontext.images.decode import ImageFormat

# What a script or an editor may write before an image: a byte order mark, line ends, zeros.
_LEADING_BYTES = re.compile(rb"(?:\xef\xbb\xbf)?[\s\0]{0,1024}")

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")
# Less than the 1 MB of unpacked metadata that Pillow allows.
_MAX_PROFILE_BYTES = 1_000_000

# The name of a WebP's first chunk.
_WEBP_CHUNK = slice(12, 16)

# The next marker in the data of a scan, where FF00 is a byte and FFD0 to FFD7 restart the decoder.
_JPEG_NEXT_MARKER = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")
# JPEG markers that hold a size, those without content, and the two that matter here.
_JPEG_SIZE_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
JPEG_END, JPEG_SCAN = 0xD9, 0xDA
_JPEG_STANDALONE_MARKERS = frozenset({0x01, 0xD8, JPEG_END})
_MAX_SEGMENT_BYTES = 65_535

# Encoders write at most some twenty scans, and chunks of 4 kB or more.
_MAX_JPEG_SCANS = 100
_MAX_PARTS = 20_000

# A quarter turn to the left or right, mirrored or not.
_SIDEWAYS_ORIENTATIONS = range(5, 9)


def read_size(data: bytes) -> tuple[int, int] | None:
    """Return width and height in pixels of a JPEG, PNG or WebP; None if the header has none."""
    data = strip_leading_bytes(data)
    try:
        if data.startswith(PNG_SIGNATURE):
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
    data = strip_leading_bytes(data)
    scans = 0
    with contextlib.suppress(struct.error):
        if data.startswith(b"\xff\xd8"):
            for number, (marker, *_) in enumerate(iter_jpeg_segments(data), start=1):
                scans += marker == JPEG_SCAN
                if scans > _MAX_JPEG_SCANS:
                    return f"it has more than {_MAX_JPEG_SCANS} scans"
                if number > _MAX_PARTS:
                    return f"it has more than {_MAX_PARTS:,} segments"
        elif data.startswith(PNG_SIGNATURE):
            for number, _ in enumerate(iter_png_chunks(data), start=1):
                if number > _MAX_PARTS:
                    return f"it has more than {_MAX_PARTS:,} chunks"
    return None


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


def strip_leading_bytes(data: bytes) -> bytes:
    """Return the bytes without white space, zeros and a byte order mark before the image."""
    found = _LEADING_BYTES.match(data)
    return data[found.end() :] if found and found.end() else data


def extract_image(data: bytes) -> bytes | None:
    """Return the bytes that a decoder needs: no text, and nothing before or after the image.

    None if the image is cut off. Bytes that are not a JPEG, PNG or WebP are returned unchanged.
    """
    data = strip_leading_bytes(data)
    try:
        if data.startswith(PNG_SIGNATURE):
            return _extract_png(data)
        if data.startswith(b"\xff\xd8"):
            has_end = any(marker == JPEG_END for marker, *_ in iter_jpeg_segments(data))
            return data if has_end else None
    except (struct.error, IndexError):
        return None
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        end = int.from_bytes(data[4:8], "little") + 8
        return data[:end] if end <= len(data) else None
    return data


def read_format(data: bytes) -> ImageFormat:
    """Return the format of an image that is known to be a JPEG, PNG or WebP."""
    data = strip_leading_bytes(data)
    if data.startswith(b"\xff\xd8"):
        return "jpeg"
    return "png" if data.startswith(b"\x89PNG") else "webp"


def _extract_png(data: bytes) -> bytes | None:
    """Return a PNG without text, which can be long, and without an unreadable profile."""
    chunks = [PNG_SIGNATURE]
    for kind, at, end in iter_png_chunks(data):
        if end > len(data):
            return None
        is_unreadable = kind == b"iCCP" and not _is_readable_profile(data[at + 8 : end - 4])
        if kind not in _PNG_TEXT_CHUNKS and not is_unreadable:
            chunks.append(data[at:end])
    return b"".join(chunks)


def _is_readable_profile(chunk: bytes) -> bool:
    """Return whether a PNG's colour profile unpacks, and to no more than the decoder takes."""
    _, _, packed = chunk.partition(b"\0")
    unpacking = zlib.decompressobj()
    try:
        unpacking.decompress(packed[1:], _MAX_PROFILE_BYTES)
    except zlib.error:
        return False
    return unpacking.eof


def iter_png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, start and end of each chunk; raise struct.error if there is no last one."""
    at, kind = len(PNG_SIGNATURE), b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, at)
        yield kind, at, at + 12 + length
        at += 12 + length


def iter_webp_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, start and end of each chunk; raise struct.error if one is cut off."""
    at, end = 12, 8 + int.from_bytes(data[4:8], "little")
    while at < end:
        kind, length = struct.unpack_from("<4sI", data, at)
        yield kind, at, at + 8 + length + length % 2
        at += 8 + length + length % 2


def iter_jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Yield each marker, where its segment and its content begin, and where the segment ends.

    Bytes between two segments are the data of a scan. Raises struct.error if a segment is cut off.
    """
    at = 2
    while found := _JPEG_NEXT_MARKER.search(data, at):
        content = at = found.end()
        marker = data[content - 1]
        if marker not in _JPEG_STANDALONE_MARKERS:
            at += struct.unpack_from(">H", data, content)[0]
        yield marker, found.start(), content, at
        if marker == JPEG_END:
            return


def _read_jpeg_size(data: bytes) -> tuple[int, int] | None:
    for marker, _, at, _ in iter_jpeg_segments(data):
        if marker in _JPEG_SIZE_MARKERS:
            height, width = struct.unpack_from(">HH", data, at + 3)
            return width, height
    return None


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
