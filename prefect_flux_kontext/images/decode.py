"""Decode images and check that they are whole. The bytes count, never the file name."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal, cast

from PIL import Image, UnidentifiedImageError

from prefect_flux_kontext.errors import InvalidImageError
from prefect_flux_kontext.images.headers import find_slow_structure

ImageFormat = Literal["jpeg", "png", "webp"]

EXTENSIONS: dict[ImageFormat, str] = {"jpeg": "jpg", "png": "png", "webp": "webp"}
"""The file name extension of each format."""

MAX_PIXELS = 64_000_000
"""Larger images are rejected before they are decoded: they may be decompression bombs."""


@dataclass(frozen=True)
class ImageInfo:
    """The format of an image, and its width and height in pixels."""

    format: ImageFormat
    width: int
    height: int


def inspect_image(data: bytes) -> ImageInfo:
    """Decode the whole image and return its format and size; see `decode_image`."""
    return decode_image(data)[0]


def decode_image(data: bytes) -> tuple[ImageInfo, Image.Image]:
    """Decode the whole image in memory.

    Decoders accept some truncated files, so the end marker of the format is checked too.

    Args:
        data: The bytes of the file.

    Returns:
        Its format and size, and the decoded image.

    Raises:
        InvalidImageError: The bytes are not a whole JPEG, PNG or WebP, or the image has more than
            64 million pixels, or so many scans or chunks that decoding takes long.
    """
    if slow := find_slow_structure(data):
        raise InvalidImageError(
            f"The {len(data):,} bytes would take long to decode: {slow}; encode the image again."
        )
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            # An MPO is a JPEG followed by a second image, such as a gain map.
            name = "jpeg" if image.format == "MPO" else str(image.format).lower()
            image_format = cast("ImageFormat", name)
            width, height = image.size
            if width * height <= MAX_PIXELS:
                image.load()
    except UnidentifiedImageError:
        raise InvalidImageError(
            f"The {len(data):,} bytes are not a JPEG, PNG or WebP; they start with {data[:16]!r}."
        ) from None
    except Exception as error:  # noqa: BLE001 - decoders raise many types of errors
        raise InvalidImageError(
            f"The {len(data):,} bytes are not a whole image ({error}); they start with "
            f"{data[:16]!r}."
        ) from None
    if width * height > MAX_PIXELS:
        raise InvalidImageError(
            f"The image has {width} x {height} pixels; at most {MAX_PIXELS:,} are decoded."
        )
    if not _has_end_marker(data, image_format):
        raise InvalidImageError(
            f"The {image_format.upper()} is cut off after {len(data):,} bytes."
        )
    return ImageInfo(format=image_format, width=width, height=height), image


def _has_end_marker(data: bytes, image_format: ImageFormat) -> bool:
    if image_format == "jpeg":
        return data.rstrip(b"\0\r\n ").endswith(b"\xff\xd9")
    if image_format == "png":
        return data.rstrip(b"\0\r\n ").endswith(b"IEND\xaeB`\x82")
    return int.from_bytes(data[4:8], "little") + 8 <= len(data)
