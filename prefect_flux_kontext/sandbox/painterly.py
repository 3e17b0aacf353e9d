"""Styles with a brush: watercolour and oil."""

from __future__ import annotations

import math
import random

from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter, ImageOps

from prefect_flux_kontext.sandbox.drawn import ink
from prefect_flux_kontext.sandbox.textures import blotches, paper, torn_border
from prefect_flux_kontext.sandbox.tones import (
    ACROSS,
    DOWN,
    LIT_FROM_UPPER_LEFT,
    colours,
    slope,
    smooth,
    table,
    three,
    unit,
)

_TURNS = 48
_FORM = 10
# The direction along a form by the slopes across and down, both in 64 steps around 32.
_TURN_OF = {
    (right, below): round(math.atan2(right - 32, 32 - below) / math.pi * _TURNS) % _TURNS
    for right in range(64)
    for below in range(64)
}


def watercolour(picture: Image.Image) -> Image.Image:
    """Wet washes with dark rims on rough paper, over a faint pencil sketch."""
    length, size = unit(picture), picture.size
    wash = smooth(picture, 3)
    wash = ImageEnhance.Color(wash).enhance(1.5)
    # Wet borders wander: every blotch shows the picture moved a little another way.
    for seed, (across, down) in enumerate(((4, 2), (-3, 4), (2, -4))):
        moved = ImageChops.offset(wash, round(across * length), round(down * length))
        wet = blotches(size, 14 * length + 2, 20 + seed).point(
            table(lambda tone: (tone - 0.5) * 6 + 0.3)
        )
        wash = Image.composite(moved, wash, wet)
    steps = 6

    def pool(tone: float) -> float:
        whole, rest = divmod(tone * steps, 1)
        rest = min(1.0, max(0.0, (rest - 0.25) / 0.5))
        return 0.16 + 0.88 * math.pow(0.55 * (whole + rest) / steps + 0.45 * tone, 0.75)

    wash = wash.point(table(pool) * 3)
    # Pigment gathers at the rims of a wash.
    grey = ImageOps.grayscale(wash)
    rim = ImageChops.subtract(grey.filter(ImageFilter.GaussianBlur(5 * length)), grey, 0.5)
    wash = ImageChops.multiply(
        wash, three(ImageOps.invert(rim.point(table(lambda tone: tone * 0.75))))
    )
    for cell, seed in ((60, 31), (9, 32)):
        cloud = blotches(size, cell * length + 1, seed).point(table(lambda tone: tone**2 * 0.12))
        wash = ImageChops.screen(wash, three(cloud))
    sketch = ink(picture, 1.1 * length, 6).point(table(lambda tone: 0.5 + 0.5 * tone))
    wash = ImageChops.multiply(wash, ImageOps.colorize(sketch, (70, 55, 60), "white"))
    sheet = Image.new("RGB", size, (253, 251, 246))
    sheet.paste(wash, (0, 0), torn_border(size, 24 * length + 2))
    return ImageChops.multiply(sheet, three(paper(size)))


def oil(picture: Image.Image) -> Image.Image:
    """Brush strokes along the forms, broad first and fine where there is detail, in relief."""
    length = unit(picture)
    rich = ImageEnhance.Color(ImageOps.autocontrast(picture, cutoff=0.5)).enhance(1.3)
    canvas = smooth(rich, 4)
    forms = _Forms(rich)
    draw = ImageDraw.Draw(canvas)
    dice = random.Random(1)
    for reach, breadth, detail, most in (
        (20, 5.5, 0, 3_000),
        (10, 2.8, 8, 4_500),
        (5, 1.4, 20, 8_000),
    ):
        brush = _Brush(reach * length, breadth * length, dice)
        brush.paint(draw, forms, detail, most)
    canvas = canvas.filter(ImageFilter.SMOOTH)
    relief = slope(ImageOps.grayscale(canvas), LIT_FROM_UPPER_LEFT, 3.5)
    return ImageChops.overlay(canvas, three(relief))


class _Forms:
    """A picture as a painter sees it, in small places, row by row.

    Attributes:
        columns: Places in a row.
        cell: Width and height of a place in pixels.
        colours: The colour of every place.
        slopes: How steeply the brightness changes there, 0 to 255.
        turns: The direction of a stroke there, in `_TURNS` steps of half a circle.
    """

    def __init__(self, picture: Image.Image) -> None:
        self.columns = max(3, round(picture.width / (4 * unit(picture))))
        rows = max(3, round(self.columns * picture.height / picture.width))
        self.cell = picture.width / self.columns, picture.height / rows
        small = picture.resize((self.columns, rows), Image.Resampling.BOX)
        self.colours = colours(small)
        grey = ImageOps.grayscale(small).filter(ImageFilter.GaussianBlur(1.5))
        across = slope(grey, ACROSS, 2)
        down = slope(grey, DOWN, 2)
        away = table(lambda tone: abs(tone - 0.5) * 2)
        self.slopes = ImageChops.add(across.point(away), down.point(away)).tobytes()
        # Along the form where there is one, else along a slow sway over the whole canvas.
        sway = blotches(small.size, 20, 41).tobytes()
        self.turns = [
            _TURN_OF[right >> 2, below >> 2] if steep > _FORM else calm * _TURNS >> 8
            for right, below, steep, calm in zip(
                across.tobytes(), down.tobytes(), self.slopes, sway, strict=True
            )
        ]


class _Brush:
    """A brush and the strokes it makes in every direction."""

    def __init__(self, reach: float, breadth: float, dice: random.Random) -> None:
        self._dice = dice
        self._strokes = [
            _stroke(turn * math.pi / _TURNS, reach * dice.uniform(0.65, 1.15), breadth)
            for turn in range(_TURNS)
        ]

    def paint(self, draw: ImageDraw.ImageDraw, forms: _Forms, detail: int, most: int) -> None:
        """Strokes in random order, where the picture has enough detail.

        Args:
            draw: The canvas.
            forms: The picture.
            detail: Least slope of brightness that gets a stroke, 0 to 255.
            most: Strokes at most.
        """
        across, down = forms.cell
        chosen = [at for at, steep in enumerate(forms.slopes) if steep >= detail]
        chosen = self._dice.sample(chosen, min(most, len(chosen)))
        for at, chance in zip(chosen, self._dice.randbytes(len(chosen)), strict=True):
            row, column = divmod(at, forms.columns)
            # The same byte of chance moves a stroke off its grid and changes its light.
            x = (column + chance / 256) * across
            y = (row + 0.5) * down
            red, green, blue = forms.colours[at]
            lighter = chance % 29 - 14
            draw.polygon(
                [(x + ax, y + ay) for ax, ay in self._strokes[forms.turns[at]]],
                fill=(red + lighter, green + lighter, blue + lighter),
            )


def _stroke(angle: float, reach: float, breadth: float) -> list[tuple[float, float]]:
    """The outline of a stroke around its middle: six corners, pointed at both ends."""
    along, beside = math.cos(angle), math.sin(angle)
    outline = ((-1, 0), (-0.7, 1), (0.7, 1), (1, 0), (0.7, -1), (-0.7, -1))
    return [
        (
            far * reach * along - wide * breadth * beside,
            far * reach * beside + wide * breadth * along,
        )
        for far, wide in outline
    ]
