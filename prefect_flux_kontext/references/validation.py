"""Check by its bytes that the service accepts a reference image, or shrink it to its limits.

Equal input gives equal bytes.
"""

from __future__ import annotations

import io
import math
import re
import threading
from typing import Any

from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

from prefect_flux_kontext.errors import InvalidImageError, ReferenceImageError
from prefect_flux_kontext.images.decode import MAX_PIXELS, inspect_image
from prefect_flux_kontext.images.headers import (
    extract_image,
    find_slow_structure,
    read_size,
    strip_leading_bytes,
)

MAX_REFERENCE_BYTES = 10_000_000
"""Limit of the service. Its page says 10 MB; this is the strictest reading of that."""

MAX_SHRINKABLE_BYTES = 100_000_000
"""Largest file that is read in order to shrink it."""

# Bounds memory: an image of 64 million pixels takes 200 MB while it is decoded.
_DECODE_SLOTS = threading.BoundedSemaphore(2)

_UNSUPPORTED_FORMATS = (
    (re.compile(rb"GIF8[79]a"), "a GIF"),
    (re.compile(rb"\s*(?:<[?!].*)?<svg", re.DOTALL), "an SVG"),
    (re.compile(rb"\s*<(?:!doctype html|html|head|body)", re.IGNORECASE), "a page of HTML"),
    (re.compile(rb"\s*<\?xml"), "XML"),
    (re.compile(rb"BM"), "a BMP"),
    (re.compile(rb"II\*\0|MM\0\*"), "a TIFF"),
    (re.compile(rb"%PDF"), "a PDF"),
    (re.compile(rb"....ftyp(?:hei|hev|mif|msf)", re.DOTALL), "a HEIC"),
    (re.compile(rb"....ftypavi", re.DOTALL), "an AVIF"),
)
# Enough to recognize each of the formats above.
_HEAD_BYTES = 1_000

# A JPEG can be decoded at an eighth of its size; the largest cameras make 150 million pixels.
_MAX_JPEG_PIXELS = 160_000_000
# Tried in this order. The service makes images of about 1,000 by 1,000 pixels.
_LONG_EDGES_PIXELS = (4_096, 2_048, 1_024)
_QUALITIES = (95, 88, 80)
# Bounds memory: one image is decoded at a time.
_DECODE_LOCK = threading.Lock()


def check_size(size: int, *, fit: bool) -> None:
    """Check the size of a file, in bytes, before it is read."""
    if not size:
        raise ReferenceImageError("is an empty file")
    if size > MAX_REFERENCE_BYTES and not fit:
        raise ReferenceImageError(
            f"has {_format_megabytes(size)}; the service takes 10 MB; shrink it, or use "
            "--fit-references (in a flow, fit_references)"
        )
    if size > MAX_SHRINKABLE_BYTES:
        raise ReferenceImageError(
            f"has {_format_megabytes(size)}; at most 100 MB are read to be shrunk"
        )


def check_image(data: bytes, *, fit: bool) -> None:
    """Check an image by decoding it, unless it has too many pixels and will be shrunk to `fit`."""
    check_size(len(data), fit=fit)
    width, height = read_size(data) or (0, 0)
    with _DECODE_SLOTS:
        if width * height > MAX_PIXELS:
            problem = f"has {width:,} x {height:,} pixels, more than {MAX_PIXELS:,}"
            if not fit:
                raise ReferenceImageError(f"{problem}; shrink it")
            check_can_shrink(data, problem)
            return
        if slow := find_slow_structure(data):
            raise ReferenceImageError(f"would take long to decode: {slow}; encode it again")
        try:
            inspect_image(data)
        except InvalidImageError as error:
            raise ReferenceImageError(_describe_problem(data, error)) from None


def needs_shrinking(data: bytes) -> bool:
    """Return whether an image that passed `check_image` must be shrunk."""
    width, height = read_size(data) or (0, 0)
    return len(data) > MAX_REFERENCE_BYTES or width * height > MAX_PIXELS


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


def _describe_problem(data: bytes, error: InvalidImageError) -> str:
    head = data[:_HEAD_BYTES]
    for pattern, kind in _UNSUPPORTED_FORMATS:
        if pattern.match(head):
            return f"is {kind} by its content; the service takes JPG, PNG and WebP"
    if read_size(data):
        return f"is cut off or damaged: {error.message.partition('; they start')[0].rstrip('.')}"
    kind = "text" if head.isascii() and b"\0" not in head else "not an image"
    return f"is {kind} by its content; the service takes JPG, PNG and WebP"


def _format_megabytes(size: int) -> str:
    # Rounded up, so that a file one byte over the limit does not read "10.0 MB".
    return f"{math.ceil(size / 100_000) / 10:.1f} MB"
