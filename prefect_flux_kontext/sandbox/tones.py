"""Small tools that every style uses: tables for `Image.point`, colours, lengths, smoothing."""

from __future__ import annotations

import colorsys
from typing import TYPE_CHECKING, cast

from PIL import Image, ImageFilter

if TYPE_CHECKING:
    from collections.abc import Callable

Colour = tuple[int, int, int]

# Pillow takes the rows of a kernel from the bottom up.
ACROSS = (-1, 0, 1, -2, 0, 2, -1, 0, 1)
DOWN = (1, 2, 1, 0, 0, 0, -1, -2, -1)
LIT_FROM_UPPER_LEFT = (0, 1, 2, -1, 0, 1, -2, -1, 0)


def table(tone: Callable[[float], float]) -> list[int]:
    """A table for `Image.point` from a function of brightness, 0 to 1 on both sides."""
    return [round(255 * min(1.0, max(0.0, tone(level / 255)))) for level in range(256)]


def ramp(low: float, high: float) -> list[int]:
    """A table that takes `low` to black and `high` to white, straight in between, 0 to 1."""
    return table(lambda tone: (tone - low) / (high - low))


def curve(contrast: float, lift: float = 0.0) -> list[int]:
    """A table with an S-shaped tone curve.

    Args:
        contrast: 0 leaves tones as they are, 1 is hard.
        lift: Brightness that black is raised to, 0 to 1.
    """
    return table(
        lambda tone: (
            lift + (1 - lift) * (tone + contrast * (tone * tone * (3 - 2 * tone) - tone) * 1.8)
        )
    )


def rgb(hue: float, saturation: float, value: float) -> Colour:
    """A colour from hue, saturation and value, each 0 to 1; the hue goes round."""
    red, green, blue = colorsys.hsv_to_rgb(hue % 1.0, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def unit(picture: Image.Image) -> float:
    """A length in pixels that looks the same at every size: 1 at 1,024 pixels."""
    return max(picture.size) / 1024


def smooth(picture: Image.Image, cell: int) -> Image.Image:
    """Flattens detail but keeps edges: a median at a fraction of the size, which is quick."""
    small = picture.resize(
        (max(2, picture.width // cell), max(2, picture.height // cell)), Image.Resampling.BOX
    )
    return small.filter(ImageFilter.MedianFilter(3)).resize(picture.size, Image.Resampling.BICUBIC)


def colours(picture: Image.Image) -> list[Colour]:
    """The colours of an RGB picture's pixels, row by row."""
    return cast("list[Colour]", list(picture.get_flattened_data()))


def slope(grey: Image.Image, direction: tuple[int, ...], flatness: float) -> Image.Image:
    """How the brightness rises in a direction, around middle grey.

    Args:
        grey: The heights.
        direction: `ACROSS`, `DOWN` or `LIT_FROM_UPPER_LEFT`.
        flatness: What the rise is divided by.
    """
    return grey.filter(ImageFilter.Kernel((3, 3), direction, flatness, 128))


def three(grey: Image.Image) -> Image.Image:
    """A grey picture as RGB, to be combined with one."""
    return Image.merge("RGB", (grey, grey, grey))
