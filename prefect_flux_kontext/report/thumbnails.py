"""Small pictures of large ones."""

from __future__ import annotations

import io

from PIL import Image, ImageOps

from prefect_flux_kontext.images import MOST_PIXELS

AFTER, BEFORE = 320, 640
"""Pixels of the long edge: many of what was made are seen at once, what it was made of alone."""

_QUALITY = 72


def thumbnail(data: bytes, edge: int) -> bytes:
    """A small WebP of an image's bytes; see `small_picture`.

    Args:
        data: A JPEG, PNG or WebP.
        edge: Pixels that neither side of it passes.

    Raises:
        Exception: It is no such image; decoders raise whatever they stumble on.
    """
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
        if image.width * image.height > MOST_PIXELS:
            raise ValueError("it has too many pixels")
        # A JPEG decodes several times faster at the size it is wanted in.
        image.draft("RGB", (edge, edge))
        return small_picture(image, edge)


def small_picture(image: Image.Image, edge: int) -> bytes:
    """A small WebP of a picture, upright, without what else its file holds.

    Args:
        image: Decoded or not.
        edge: Pixels that neither side of it passes.

    Raises:
        Exception: Decoders raise whatever they stumble on.
    """
    small = ImageOps.exif_transpose(image)
    small.thumbnail((edge, edge))
    file = io.BytesIO()
    has_alpha = small.mode in ("RGBA", "LA", "PA") or "transparency" in small.info
    small.convert("RGBA" if has_alpha else "RGB").save(file, "WEBP", quality=_QUALITY, method=2)
    return file.getvalue()
