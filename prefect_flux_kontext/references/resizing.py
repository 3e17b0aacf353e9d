"""Making an image small enough for the service: the same bytes each time, for the same image."""

from __future__ import annotations

import io
import threading
from typing import Any

from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

from prefect_flux_kontext.errors import ReferenceImageError
from prefect_flux_kontext.images.decode import MAX_PIXELS

_MOST_PIXELS_OF_JPEG = 160_000_000
"""A JPEG can be decoded at an eighth of its size; the largest cameras make 150 million pixels."""

_LONG_EDGES = (4_096, 2_048, 1_024)
"""Pixels. The service makes images of about 1,000 by 1,000."""

_QUALITIES = (95, 88, 80)
_ONE_AT_A_TIME = threading.Lock()


def check_can_shrink(data: bytes, told: str) -> None:
    """Whether an image of too many pixels can be shrunk without a machine's whole memory.

    Args:
        data: The bytes of the file.
        told: What it is, for the message.

    Raises:
        ReferenceImageError: It cannot.
    """
    if not data.startswith(b"\xff\xd8"):
        raise ReferenceImageError(f"{told}; shrink it: it is not decoded")
    with _ONE_AT_A_TIME, _decoded(data, told):
        pass


def shrink_to_fit(data: bytes, largest: int) -> bytes:
    """Shrink and encode an image anew: upright, its colours and its transparency kept.

    Args:
        data: A whole JPG, PNG or WebP.
        largest: Bytes that the result may have.

    Returns:
        A JPG, or a WebP where the image has transparent parts.

    Raises:
        ReferenceImageError: It cannot be decoded.
    """
    with _ONE_AT_A_TIME, _decoded(data, "is too large") as image:
        kind = "webp" if image.mode == "RGBA" else "jpeg"
        profile = image.info.get("icc_profile")
        for edge in _LONG_EDGES:
            image.thumbnail((edge, edge), Image.Resampling.LANCZOS)
            for quality in _QUALITIES:
                file = io.BytesIO()
                image.save(file, kind, quality=quality, icc_profile=profile, exif=b"")
                if file.tell() <= largest:
                    return file.getvalue()
    raise ReferenceImageError(f"cannot be shrunk to {largest:,} bytes")


def _decoded(data: bytes, told: str) -> Image.Image:
    """The image upright, as RGB or RGBA, of 64 million pixels at most."""
    try:
        return _upright(data, told)
    except ReferenceImageError:
        raise
    except Exception as error:  # noqa: BLE001 - decoders raise whatever they stumble on
        raise ReferenceImageError(f"{told}, and is not whole: {error}") from None


def _upright(data: bytes, told: str) -> Image.Image:
    image: Any
    if data.startswith(b"\xff\xd8"):
        # Not by `Image.open`, which takes what is merely large for a bomb.
        image = JpegImageFile(io.BytesIO(data))
        if image.width * image.height > _MOST_PIXELS_OF_JPEG:
            raise ReferenceImageError(
                f"{told}; shrink it: more than {_MOST_PIXELS_OF_JPEG:,} are not decoded"
            )
        image.draft(None, (_LONG_EDGES[0], _LONG_EDGES[0]))
    else:
        image = Image.open(io.BytesIO(data), formats=("PNG", "WEBP"))
    if image.width * image.height > MAX_PIXELS:
        raise ReferenceImageError(f"{told}; shrink it: it is not decoded")
    image.load()
    profile = image.info.get("icc_profile") if image.mode in ("RGB", "RGBA") else None
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # 16 bits of grey, of which a plain conversion would only keep the darkest.
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    image.info = {"icc_profile": profile} if profile else {}
    return image  # type: ignore[no-any-return]
