"""Restyling a reference, or painting a scene from nothing, in the style a prompt asks for."""

from __future__ import annotations

import hashlib
import io
import re
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image, ImageOps

from prefect_flux_kontext.sandbox import drawn, painterly, photographic, tiled
from prefect_flux_kontext.sandbox.references import open_image
from prefect_flux_kontext.sandbox.scenes import draw_scene

if TYPE_CHECKING:
    from collections.abc import Callable

STYLES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "stained glass": tiled.stained_glass,
    "mosaic": tiled.mosaic,
    "watercolour": painterly.watercolour,
    "pop art": drawn.pop_art,
    "poster": drawn.poster,
    "pencil": drawn.pencil,
    "oil": painterly.oil,
    "cartoon": drawn.cartoon,
    "noir": photographic.noir,
    "vintage": photographic.vintage,
    "neon": drawn.neon,
}
"""What each style does to a picture. Where a prompt names several, the first one here wins."""

_WORDS = {
    "stained glass": r"stained[ -]glass|leadlight",
    "mosaic": r"mosaics?|tessera[e]?|tiles?",
    "watercolour": r"water[ -]?colou?rs?|aquarelle|gouache",
    "pop art": r"pop[ -]?art|comics?|halftone|warhol|lichtenstein",
    "poster": r"posters?|screen[ -]?prints?|linocut|risograph|silk[ -]?screen",
    "pencil": r"pencils?|sketch(es|ed)?|drawings?|drawn|charcoal|graphite|etching",
    "oil": r"oils?|impasto|van gogh|impressionis[mt]\w*|acrylics?|brush ?strokes?|painting",
    "cartoon": r"anime|cartoons?|ghibli|manga|toon|cel[ -]shad\w+",
    "noir": r"noir|black[ -]and[ -]white|b&w|monochrome|grayscale|greyscale",
    "vintage": r"vintage|sepia|retro|antique|daguerreotype|old photo\w*|polaroid",
    "neon": r"neon|cyberpunk|synthwave|vaporwave|glow\w*",
}
_PATTERNS = {name: re.compile(rf"\b(?:{_WORDS[name]})\b", re.IGNORECASE) for name in STYLES}

_TINTS = 24
_JPEG_QUALITY = 88


class Style(NamedTuple):
    """What a prompt asks for.

    Attributes:
        name: A key of `STYLES`, or `tint` when the prompt names none.
        tint: Which of 24 tints; 0 unless the name is `tint`.
    """

    name: str
    tint: int = 0


def style_of(prompt: str) -> Style:
    """The style that a prompt's words ask for, else a tint from its hash."""
    for name, pattern in _PATTERNS.items():
        if pattern.search(prompt):
            return Style(name)
    return Style("tint", hashlib.sha256(prompt.encode()).digest()[0] % _TINTS)


def paint(
    reference: bytes | None,
    prompt: str,
    style: Style,
    *,
    aspect_ratio: str,
    output_format: str,
    long_edge: int,
) -> bytes:
    """One encoded result picture; the same arguments give the same bytes.

    Args:
        reference: The reference's bytes, or None to draw a scene from the prompt.
        prompt: The prompt; with a reference only its style counts.
        style: The style, from `style_of`; a tint is for references, a scene has its own light.
        aspect_ratio: Width to height, as in `16:9`; the reference is cropped at its centre.
        output_format: `jpeg` or `png`.
        long_edge: Pixels on the long edge.

    Raises:
        BadReferenceError: When the reference is no picture.
    """
    across, down = map(int, aspect_ratio.split(":"))
    scale = long_edge / max(across, down)
    size = (max(1, round(across * scale)), max(1, round(down * scale)))
    if reference is None:
        picture = draw_scene(prompt, size)
    else:
        picture = ImageOps.fit(open_image(reference, long_edge), size, Image.Resampling.BICUBIC)
    if style.name in STYLES:
        picture = STYLES[style.name](picture)
    elif reference is not None:
        picture = photographic.split_tone(picture, style.tint / _TINTS)
    encoded = io.BytesIO()
    if output_format == "png":
        picture.save(encoded, "PNG", compress_level=1)
    else:
        picture.save(encoded, "JPEG", quality=_JPEG_QUALITY)
    return encoded.getvalue()
