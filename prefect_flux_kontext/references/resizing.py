"""Shrink images to the limits of the service; equal input gives equal bytes."""

from __future__ import annotations

import io
import threading
from typing import Any

from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

from prefect_flux_kontext.errors import ReferenceImageError
from prefect_flux_kontext.images.decode import MAX_PIXELS
from prefect_flux_kontext.images.headers import (
    extract_image,
    find_slow_structure,
    strip_leading_bytes,
)

# A JPEG can be decoded at an eighth of its size; the largest cameras make 150 million pixels.
_MAX_JPEG_PIXELS = 160_000_000
# Tried in this order. The service makes images of about 1,000 by 1,000 pixels.
_LONG_EDGES_PIXELS = (4_096, 2_048, 1_024)
_QUALITIES = (95, 88, 80)
# Bounds memory: one image is decoded at a time.
_DECODE_LOCK = threading.Lock()


def check_can_shrink(data: bytes, problem: str) -> None:
    """Check that an image of too many pixels can be shrunk; messages begin with the problem."""
    if not strip_leading_bytes(data).startswith(b"\xff\xd8"):
        raise ReferenceImageError(f"{problem}; shrink it yourself: it is too large to decode")
    with _DECODE_LOCK, _decode(data, problem):
        pass


def shrink_to_fit(data: bytes, max_bytes: int) -> bytes:
    """Shrink an image to a JPG, or a WebP if it has transparent areas, turned upright."""
    with _DECODE_LOCK, _decode(data, "is too large") as image:
        kind = "webp" if image.mode == "RGBA" else "jpeg"
        profile = image.info.get("icc_profile")
        for edge in _LONG_EDGES_PIXELS:
            image.thumbnail((edge, edge), Image.Resampling.LANCZOS)
            for quality in _QUALITIES:
                file = io.BytesIO()
                image.save(file, kind, quality=quality, icc_profile=profile, exif=b"")
                if file.tell() <= max_bytes:
                    return file.getvalue()
    raise ReferenceImageError(f"cannot be shrunk to {max_bytes:,} bytes")


def _decode(data: bytes, problem: str) -> Image.Image:
    """Decode an image upright, as RGB or RGBA, of at most 64 million pixels."""
    try:
        return _decode_upright(data, problem)
    except ReferenceImageError:
        raise
    except Exception as error:  # noqa: BLE001 - decoders raise errors of any type
        raise ReferenceImageError(f"{problem} and is damaged: {error}") from None


def _decode_upright(data: bytes, problem: str) -> Image.Image:
    image: Any
    if slow := find_slow_structure(data):
        raise ReferenceImageError(f"{problem} and would take long to decode: {slow}")
    data = extract_image(data) or data
    if data.startswith(b"\xff\xd8"):
        # `Image.open` rejects large images as decompression bombs.
        image = JpegImageFile(io.BytesIO(data))
        if image.width * image.height > _MAX_JPEG_PIXELS:
            raise ReferenceImageError(
                f"{problem}; shrink it yourself: JPEGs of more than {_MAX_JPEG_PIXELS:,} pixels "
                "are not decoded"
            )
        image.draft(None, (_LONG_EDGES_PIXELS[0], _LONG_EDGES_PIXELS[0]))
    else:
        image = Image.open(io.BytesIO(data), formats=("PNG", "WEBP"))
    if image.width * image.height > MAX_PIXELS:
        raise ReferenceImageError(f"{problem}; shrink it yourself: it is too large to decode")
    image.load()
    profile = image.info.get("icc_profile") if image.mode in ("RGB", "RGBA") else None
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # 16-bit grey: a plain conversion clips all but the darkest values.
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    image.info = {"icc_profile": profile} if profile else {}
    return image  # type: ignore[no-any-return]
