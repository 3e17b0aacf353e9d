"""Decode images and check that they are whole. The bytes count, never the file name."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal, cast

from PIL import Image, UnidentifiedImageError

from prefect_flux_kontext.errors import InvalidImageError
from prefect_flux_kontext.images.headers import cut_to_image, has_whole_jpegs

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

    The image ends where its format says so. What follows, and large metadata, cannot make it
    invalid.

    Args:
        data: The bytes of the file.

    Returns:
        Its format and size, and the decoded image.

    Raises:
        InvalidImageError: The bytes are not a whole JPEG, PNG or WebP, or the image has more than
            64 million pixels.
    """
    picture = cut_to_image(data)
    try:
        with Image.open(io.BytesIO(picture or data), formats=("JPEG", "PNG", "WEBP")) as image:
            # An MPO is a JPEG followed by a second image, such as a gain map.
            is_mpo = image.format == "MPO"
            image_format = cast("ImageFormat", "jpeg" if is_mpo else str(image.format).lower())
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
    if picture is None or (is_mpo and not has_whole_jpegs(data)):
        raise InvalidImageError(
            f"The {image_format.upper()} is cut off after {len(data):,} bytes."
        )
    return ImageInfo(format=image_format, width=width, height=height), image
