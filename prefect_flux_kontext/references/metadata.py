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
from prefect_flux_kontext.images.headers import (
    JPEG_END,
    PNG_SIGNATURE,
    iter_jpeg_segments,
    iter_png_chunks,
    iter_webp_chunks,
)

_ORIENTATION = 0x0112
_UPRIGHT = 1

# JPEG segments that are kept: JFIF, the ICC profile, and Adobe's colour transform.
_JPEG_KEPT = ((0xE0, b"JFIF\0"), (0xE2, b"ICC_PROFILE\0"), (0xEE, b"Adobe"))
_JPEG_APPLICATION, _JPEG_COMMENT = range(0xE0, 0xF0), 0xFE

# Chunks that decide how the image looks; all that begin with a capital are critical.
_PNG_KEPT = re.compile(
    rb"tRNS|gAMA|cHRM|sRGB|iCCP|cICP|sBIT|bKGD|hIST|pHYs|mDCV|cLLI|acTL|fcTL|fdAT|[A-Z][A-Za-z]{3}"
)

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
    previous_end = 2
    for marker, start, content_at, end in iter_jpeg_segments(data):
        parts.append(data[previous_end:start])  # the data of a scan
        segment = b"\xff" + data[content_at - 1 : end]
        previous_end = end
        is_extra = marker in _JPEG_APPLICATION or marker == _JPEG_COMMENT
        if not is_extra or any(
            marker == kept and segment[4:].startswith(name) for kept, name in _JPEG_KEPT
        ):
            # JFIF without its thumbnail.
            is_jfif = marker == _JPEG_KEPT[0][0]
            parts.append(b"\xff\xe0\x00\x10" + segment[4:16] + b"\0\0" if is_jfif else segment)
        if marker == JPEG_END:
            return b"".join(parts)
    raise ValueError("the end is missing")


def _clean_png(data: bytes, exif: bytes) -> bytes:
    chunks = [data[at:end] for kind, at, end in iter_png_chunks(data) if _PNG_KEPT.fullmatch(kind)]
    if exif:
        chunk = b"eXIf" + exif
        size, check = len(exif), zlib.crc32(chunk)
        chunks.insert(1, struct.pack(">I", size) + chunk + struct.pack(">I", check))
    return PNG_SIGNATURE + b"".join(chunks)


def _clean_webp(data: bytes, exif: bytes) -> bytes:
    chunks = [data[at:end] for kind, at, end in iter_webp_chunks(data) if kind in _WEBP_KEPT]
    if chunks[0].startswith(b"VP8X"):
        flags = chunks[0][8] & ~(_WEBP_EXIF | _WEBP_XMP) | (_WEBP_EXIF if exif else 0)
        chunks[0] = chunks[0][:8] + bytes([flags]) + chunks[0][9:_VP8X_BYTES]
        if exif:
            chunks.append(b"EXIF" + struct.pack("<I", len(exif)) + exif)
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body
