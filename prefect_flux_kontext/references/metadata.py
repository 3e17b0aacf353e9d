"""Remove metadata from a reference before others can fetch it: place, device, author, comments.

The pixels are not encoded again. Orientation, colour profile and what else decides how the image
looks are kept. Equal input gives equal bytes.
"""

from __future__ import annotations

import io
import re
import struct
import zlib

from PIL import Image

from prefect_flux_kontext.errors import ReferenceImageError

_ORIENTATION = 0x0112
_UPRIGHT = 1

# JPEG segments that are kept: JFIF, the ICC profile, and Adobe's colour transform.
_JPEG_KEPT = ((0xE0, b"JFIF\0"), (0xE2, b"ICC_PROFILE\0"), (0xEE, b"Adobe"))
_JPEG_APPLICATION, _JPEG_COMMENT, _JPEG_SCAN, _JPEG_END = range(0xE0, 0xF0), 0xFE, 0xDA, 0xD9
# In the data of a scan, 0xFF is followed by 0 or a restart marker.
_JPEG_MARKER = re.compile(rb"\xff+([^\x00\x01\xd0-\xd8\xff])")

# Chunks that decide how the image looks; all that begin with a capital are critical.
_PNG_KEPT = re.compile(
    rb"tRNS|gAMA|cHRM|sRGB|iCCP|cICP|sBIT|bKGD|hIST|pHYs|mDCV|cLLI|acTL|fcTL|fdAT|[A-Z][A-Za-z]{3}"
)
_PNG_HEADER_BYTES = 33

_WEBP_KEPT = frozenset((b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF", b"ICCP"))
_WEBP_EXIF, _WEBP_XMP = 0x08, 0x04
_VP8X_BYTES = 18


def remove_metadata(data: bytes) -> bytes:
    """Return an image with only its pixels, orientation and colour profile; the first of an MPO.

    Raises:
        ReferenceImageError: Its structure is damaged, so that metadata could be left.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            orientation = image.getexif().get(_ORIENTATION, _UPRIGHT)
        exif = b"" if orientation not in range(2, 9) else _build_exif(orientation)
        if data.startswith(b"\xff\xd8"):
            return _clean_jpeg(data, exif)
        return _clean_png(data, exif) if data.startswith(b"\x89PNG") else _clean_webp(data, exif)
    except Exception as error:  # noqa: BLE001 - damaged metadata raises errors of any type
        raise ReferenceImageError(
            f"has damaged metadata, which cannot be removed ({type(error).__name__}: {error}); "
            "encode the image again"
        ) from None


def _build_exif(orientation: int) -> bytes:
    """Build Exif data with one entry, the orientation."""
    return struct.pack("<2sHIHHHIII", b"II", 42, 8, 1, _ORIENTATION, 3, 1, orientation, 0)


def _clean_jpeg(data: bytes, exif: bytes) -> bytes:
    content = b"Exif\0\0" + exif
    parts = [data[:2]]
    if exif:
        parts.append(struct.pack(">2sH", b"\xff\xe1", 2 + len(content)) + content)
    at = 2
    while True:
        found = _JPEG_MARKER.search(data, at)
        if found is None:
            raise ValueError("the end is missing")
        parts.append(data[at : found.start()])  # the data of a scan
        marker = found[1][0]
        if marker == _JPEG_END:
            return b"".join(parts) + b"\xff\xd9"
        (length,) = struct.unpack_from(">H", data, found.end())
        segment = b"\xff" + data[found.end() - 1 : found.end() + length]
        at = found.end() + length
        is_extra = marker in _JPEG_APPLICATION or marker == _JPEG_COMMENT
        if not is_extra or any(
            marker == kept and segment[4:].startswith(name) for kept, name in _JPEG_KEPT
        ):
            parts.append(_drop_jfif_thumbnail(segment) if marker == _JPEG_KEPT[0][0] else segment)


def _drop_jfif_thumbnail(segment: bytes) -> bytes:
    return b"\xff\xe0\x00\x10" + segment[4:16] + b"\0\0"


def _clean_png(data: bytes, exif: bytes) -> bytes:
    parts, at, kind = [data[:_PNG_HEADER_BYTES]], _PNG_HEADER_BYTES, b""
    if exif:
        chunk = b"eXIf" + exif
        size, check = len(exif), zlib.crc32(chunk)
        parts.append(struct.pack(">I", size) + chunk + struct.pack(">I", check))
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if _PNG_KEPT.fullmatch(kind):
            parts.append(data[at:end])
        at = end
    return b"".join(parts)


def _clean_webp(data: bytes, exif: bytes) -> bytes:
    end = 8 + int.from_bytes(data[4:8], "little")
    chunks, at = [], 12
    while at < end:
        kind, length = struct.unpack_from("<4sI", data, at)
        size = 8 + length + length % 2
        if kind in _WEBP_KEPT:
            chunks.append(data[at : at + size])
        at += size
    if chunks[0].startswith(b"VP8X"):
        flags = chunks[0][8] & ~(_WEBP_EXIF | _WEBP_XMP) | (_WEBP_EXIF if exif else 0)
        chunks[0] = chunks[0][:8] + bytes([flags]) + chunks[0][9:_VP8X_BYTES]
        if exif:
            chunks.append(b"EXIF" + struct.pack("<I", len(exif)) + exif)
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body
