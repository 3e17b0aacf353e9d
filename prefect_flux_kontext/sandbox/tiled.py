"""Styles made of pieces: mosaic and stained glass."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter, ImageOps

from prefect_flux_kontext.sandbox.textures import blotches, grain
from prefect_flux_kontext.sandbox.tones import (
    LIT_FROM_UPPER_LEFT,
    colours,
    curve,
    slope,
    table,
    three,
    unit,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prefect_flux_kontext.sandbox.tones import Colour

Point = tuple[float, float]

_ONE_PANE = 60


def mosaic(picture: Image.Image) -> Image.Image:
    """Small stones, each laid a little askew in pale mortar."""
    length, size = unit(picture), picture.size
    side = max(4.0, 12 * length)
    columns, rows = math.ceil(size[0] / side), math.ceil(size[1] / side)
    rich = ImageEnhance.Color(ImageOps.autocontrast(picture, cutoff=1)).enhance(1.3)
    stones = colours(rich.resize((columns, rows), Image.Resampling.BOX))
    wall = Image.new("RGB", size, (206, 198, 184))
    draw, dice = ImageDraw.Draw(wall), random.Random(1)
    half = side * 0.6
    for at, (red, green, blue) in enumerate(stones):
        x = (at % columns + 0.5) * side + dice.uniform(-0.06, 0.06) * side
        y = (at // columns + 0.5) * side + dice.uniform(-0.06, 0.06) * side
        turn = math.pi / 4 + dice.uniform(-0.16, 0.16)
        shine = dice.randint(-16, 16)
        corners = [
            (
                x + half * math.cos(turn + quarter * math.pi / 2),
                y + half * math.sin(turn + quarter * math.pi / 2),
            )
            for quarter in range(4)
        ]
        draw.polygon(corners, fill=(red + shine, green + shine, blue + shine))
    relief = slope(ImageOps.grayscale(wall), LIT_FROM_UPPER_LEFT, 5)
    wall = ImageChops.overlay(wall, three(relief))
    return ImageChops.overlay(wall, three(grain(size, 0.18)))


def stained_glass(picture: Image.Image) -> Image.Image:
    """Panes of coloured glass in lead, lit from behind."""
    length, size = unit(picture), picture.size
    rich = (
        ImageEnhance.Color(ImageOps.autocontrast(picture, cutoff=1))
        .enhance(1.8)
        .point(table(lambda tone: tone**0.75) * 3)
    )
    window, lead = Image.new("RGB", size), Image.new("L", size, 255)
    glazier, plumber = ImageDraw.Draw(window), ImageDraw.Draw(lead)
    width = max(1, round(2.6 * length))
    for corners, colour in _panes(rich, across=34):
        glazier.polygon(corners, fill=colour)
        plumber.line([*corners, corners[0]], fill=20, width=width)
    streaks = blotches(size, 16 * length + 1, 51).point(table(lambda tone: 0.34 + 0.36 * tone))
    window = ImageChops.overlay(window, three(streaks))
    # Light spills a little over the lead, and fades towards it inside a pane.
    lead = lead.filter(ImageFilter.GaussianBlur(0.8 * length))
    soft = lead.filter(ImageFilter.GaussianBlur(5 * length)).point(curve(0.0, 0.35))
    return ImageChops.multiply(ImageChops.multiply(window, three(soft)), three(lead))


def _panes(picture: Image.Image, across: int) -> Iterator[tuple[list[Point], Colour]]:
    """Cuts a picture into panes: crooked quarters, cut once more where colours differ."""
    columns = max(6, round(across * min(1.0, picture.width / picture.height)))
    rows = max(6, round(columns * picture.height / picture.width))
    dice = random.Random(3)

    def corner(column: int, row: int) -> Point:
        inside = 0 < column < columns, 0 < row < rows
        x, y = (dice.uniform(-0.3, 0.3) * free for free in inside)
        return (column + x) * picture.width / columns, (row + y) * picture.height / rows

    corners = [[corner(column, row) for column in range(columns + 1)] for row in range(rows + 1)]
    quarters = colours(picture.resize((columns * 2, rows * 2), Image.Resampling.BOX))
    for row in range(rows):
        for column in range(columns):
            at = row * columns * 4 + column * 2
            a, b = quarters[at : at + 2]
            d, c = quarters[at + columns * 2 : at + columns * 2 + 2]
            upper, lower = corners[row][column : column + 2], corners[row + 1][column : column + 2]
            along, astray = _distance(a, c), _distance(b, d)
            if max(along, astray) < _ONE_PANE:
                yield [*upper, *lower[::-1]], _mean(a, b, c, d)
            elif along > astray:
                yield [upper[0], upper[1], lower[0]], a
                yield [upper[1], lower[1], lower[0]], c
            else:
                yield [upper[0], upper[1], lower[1]], b
                yield [upper[0], lower[1], lower[0]], d


def _distance(one: Colour, other: Colour) -> int:
    return sum(abs(left - right) for left, right in zip(one, other, strict=True))


def _mean(*colours: Colour) -> Colour:
    red, green, blue = (sum(channel) // len(colours) for channel in zip(*colours, strict=True))
    return red, green, blue
