"""Is this a whole image, and of which kind? Judged by its bytes, never by its name."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal, cast

from PIL import Image, UnidentifiedImageError

from prefect_flux_kontext.errors import InvalidImageError

ImageFormat = Literal["jpeg", "png", "webp"]

EXTENSIONS: dict[ImageFormat, str] = {"jpeg": "jpg", "png": "png", "webp": "webp"}
"""The file name extension of each kind."""

MAX_PIXELS = 64_000_000
"""A picture of more pixels is refused before it is decoded: it may be a bomb."""


@dataclass(frozen=True)
class ImageInfo:
    """What an image's bytes say about it; width and height in pixels."""

    format: ImageFormat
    width: int
    height: int


def inspect_image(data: bytes) -> ImageInfo:
    """What an image is, once the whole of it has been decoded; see `decoded_image`."""
    return decode_image(data)[0]


def decode_image(data: bytes) -> tuple[ImageInfo, Image.Image]:
    """Decode the whole image, in memory.

    Decoding alone accepts some truncated files, so the format's own end mark is looked for too.

    Args:
        data: The bytes of the file.

    Returns:
        What it is, and the picture.

    Raises:
        InvalidImageError: It is no whole JPEG, PNG or WebP, or larger than 64 million pixels.
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
            f"The {len(data):,} bytes are no JPEG, PNG or WebP; they start with {data[:16]!r}."
        ) from None
    except Exception as error:  # noqa: BLE001 - decoders raise whatever they stumble on
        raise InvalidImageError(
            f"The {len(data):,} bytes are not a whole image ({error}); they start with "
            f"{data[:16]!r}."
        ) from None
    if width * height > MAX_PIXELS:
        raise InvalidImageError(
            f"The image has {width} x {height} pixels; at most {MAX_PIXELS:,} are decoded."
        )
    if not _has_its_end(data, kind):
        raise InvalidImageError(f"The {kind.upper()} is cut off after {len(data):,} bytes.")
    return ImageInfo(format=kind, width=width, height=height), image


def _has_its_end(data: bytes, kind: ImageFormat) -> bool:
    if kind == "jpeg":
        return data.rstrip(b"\0\r\n ").endswith(b"\xff\xd9")
    if kind == "png":
        return data.rstrip(b"\0\r\n ").endswith(b"IEND\xaeB`\x82")
    return int.from_bytes(data[4:8], "little") + 8 <= len(data)
