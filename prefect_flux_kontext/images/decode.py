"""Check that bytes are a complete image, and find its format. File names do not count."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal, cast

from PIL import Image, UnidentifiedImageError

from prefect_flux_kontext.errors import InvalidImageError

ImageFormat = Literal["jpeg", "png", "webp"]

EXTENSIONS: dict[ImageFormat, str] = {"jpeg": "jpg", "png": "png", "webp": "webp"}
"""File name extension of each format, without the dot."""

MAX_PIXELS = 64_000_000
"""Larger images are refused before decoding, since they may be decompression bombs."""


@dataclass(frozen=True)
class ImageInfo:
    """Format of an image, and its width and height in pixels."""

    format: ImageFormat
    width: int
    height: int


def inspect_image(data: bytes) -> ImageInfo:
    """Decode the whole image and return its format and size; see `decode_image`."""
    return decode_image(data)[0]


def decode_image(data: bytes) -> tuple[ImageInfo, Image.Image]:
    """Decode the whole image, in memory.

    Decoders accept some truncated files, so the end marker of the format is checked too.

    Args:
        data: Content of the file.

    Returns:
        The format and size, and the decoded image.

    Raises:
        InvalidImageError: The data is not a complete JPEG, PNG or WebP, or the image has more
            than 64 million pixels.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            # An MPO is a JPEG with a second picture after it, such as a gain map.
            name = "jpeg" if image.format == "MPO" else str(image.format).lower()
            kind = cast("ImageFormat", name)
            width, height = image.size
            if width * height <= MAX_PIXELS:
                image.load()
    except UnidentifiedImageError:
        raise InvalidImageError(
            f"The {len(data):,} bytes are not a JPEG, PNG or WebP; they start with {data[:16]!r}."
        ) from None
    except Exception as error:  # noqa: BLE001 - decoders raise errors of any type
        raise InvalidImageError(
            f"The {len(data):,} bytes are not a whole image ({error}); they start with "
            f"{data[:16]!r}."
        ) from None
    if width * height > MAX_PIXELS:
        raise InvalidImageError(
            f"The image has {width} x {height} pixels; at most {MAX_PIXELS:,} are decoded."
        )
    if not _has_end_marker(data, kind):
        raise InvalidImageError(f"The {kind.upper()} is cut off after {len(data):,} bytes.")
    return ImageInfo(format=kind, width=width, height=height), image


def _has_end_marker(data: bytes, kind: ImageFormat) -> bool:
    if kind == "jpeg":
        return data.rstrip(b"\0\r\n ").endswith(b"\xff\xd9")
    if kind == "png":
        return data.rstrip(b"\0\r\n ").endswith(b"IEND\xaeB`\x82")
    return int.from_bytes(data[4:8], "little") + 8 <= len(data)
