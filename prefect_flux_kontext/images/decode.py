"""Decode images and check that they are whole. The bytes count, never the file name."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, Literal, cast

from PIL import Image, UnidentifiedImageError

from prefect_flux_kontext.errors import InvalidImageError
from prefect_flux_kontext.images.headers import extract_image, find_slow_structure

ImageFormat = Literal["jpeg", "png", "webp"]

EXTENSIONS: dict[ImageFormat, str] = {"jpeg": "jpg", "png": "png", "webp": "webp"}
"""The file name extension of each format."""

MAX_PIXELS = 64_000_000
"""Larger images are rejected before they are decoded: they may be decompression bombs."""

# The entry of a Multi-Picture index that lists the pictures.
_MPO_ENTRIES = 0xB002


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
    """Decode the whole image in memory, and return its format and size, and the image.

    An image ends where its format says, whatever follows. Decoders accept some truncated files,
    so the end marker of the format is checked too. Text inside a PNG is not read.

    Raises:
        InvalidImageError: The bytes are not a whole JPEG, PNG or WebP, or the image has more than
            64 million pixels, or scans or chunks that take long to decode.
    """
    if slow := find_slow_structure(data):
        raise InvalidImageError(
            f"The {len(data):,} bytes would take long to decode: {slow}; encode the image again."
        )
    image_bytes = extract_image(data)
    try:
        with Image.open(io.BytesIO(image_bytes or data), formats=("JPEG", "PNG", "WEBP")) as image:
            # An MPO is a JPEG followed by a second image, such as a gain map.
            name = str(image.format).lower()
            image_format = cast("ImageFormat", "jpeg" if name == "mpo" else name)
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
    if image_bytes is None or (name == "mpo" and not _has_all_pictures(image, image_bytes)):
        raise InvalidImageError(
            f"The {image_format.upper()} is cut off after {len(data):,} bytes."
        )
    return ImageInfo(format=image_format, width=width, height=height), image


def _has_all_pictures(image: Any, data: bytes) -> bool:
    """Return whether the pictures after the first one of a Multi-Picture file are whole."""
    if data.rstrip(b"\0\r\n ").endswith(b"\xff\xd9"):
        return True
    # The offsets in the index count from behind its name.
    start = data.index(b"MPF\0") + 4
    pictures = image.mpinfo[_MPO_ENTRIES]
    return all(start + entry["DataOffset"] + entry["Size"] <= len(data) for entry in pictures[1:])
