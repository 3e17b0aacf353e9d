"""Surfaces that styles are painted on: grain, paper, hatching, dots. Made once for each size."""

from __future__ import annotations

import math
import random
from functools import lru_cache

from PIL import Image, ImageChops, ImageFilter

from prefect_flux_kontext.sandbox.tones import LIT_FROM_UPPER_LEFT, slope, table

Size = tuple[int, int]

# One size is in use most of the time; a few more must not hold much memory.
_once_for_each_size = lru_cache(maxsize=16)


def noise(size: Size, seed: int) -> Image.Image:
    """White noise in 256 grey levels, the same for the same seed."""
    width, height = size
    return Image.frombytes("L", size, random.Random(seed).randbytes(width * height))


@_once_for_each_size
def blotches(size: Size, cell: float, seed: int) -> Image.Image:
    """Soft noise whose blotches are about `cell` pixels wide."""
    coarse = noise((max(2, round(size[0] / cell)), max(2, round(size[1] / cell))), seed)
    return coarse.resize(size, Image.Resampling.BICUBIC)


@_once_for_each_size
def grain(size: Size, strength: float) -> Image.Image:
    """Film grain around middle grey, for `ImageChops.overlay`."""
    soft = noise(size, 2).filter(ImageFilter.GaussianBlur(0.6))
    return soft.point(table(lambda tone: 0.5 + (tone - 0.5) * strength))


@_once_for_each_size
def paper(size: Size) -> Image.Image:
    """Rough paper lit from one side: nearly white, for `ImageChops.multiply`."""
    bumps = ImageChops.add(blotches(size, 3.6, 3), blotches(size, 1.8, 4), 2)
    lit = slope(bumps, LIT_FROM_UPPER_LEFT, 2.4)
    return lit.point(table(lambda tone: 0.94 + (tone - 0.5) * 0.22))


@_once_for_each_size
def hatching(size: Size, angle: float, period: float) -> Image.Image:
    """Strokes at an angle in degrees, about `period` pixels apart, of uneven pressure."""
    reach = math.ceil(math.hypot(*size)) + 2
    # Noise stretched along one axis is a field of strokes.
    strokes = noise((max(2, int(reach / (period * 18))), max(2, int(reach / period))), 5)
    strokes = strokes.resize((reach, reach), Image.Resampling.BICUBIC)
    left, top = (reach - size[0]) // 2, (reach - size[1]) // 2
    return strokes.rotate(angle, Image.Resampling.BILINEAR).crop(
        (left, top, left + size[0], top + size[1])
    )


@_once_for_each_size
def dots(size: Size, period: int) -> Image.Image:
    """A halftone screen: bumps in rows at 45 degrees, brightest in each middle."""
    across = [2 * math.pi * step / period for step in range(period)]
    bump = bytes(
        round(127.5 + 63.7 * (math.cos(x + y) + math.cos(x - y))) for y in across for x in across
    )
    sheet = Image.new("L", size)
    sheet.paste(Image.frombytes("L", (period, period), bump))
    filled = [period, period]
    for axis in (0, 1):
        while filled[axis] < size[axis]:
            copy = sheet.crop((0, 0, min(filled[0], size[0]), min(filled[1], size[1])))
            sheet.paste(copy, (filled[0], 0) if axis == 0 else (0, filled[1]))
            filled[axis] *= 2
    return sheet


@_once_for_each_size
def vignette(size: Size, strength: float) -> Image.Image:
    """White in the middle, darker to the corners, for `ImageChops.multiply`."""
    # The gradient is the distance from the centre, and 1 at the middle of an edge.
    distance = Image.radial_gradient("L").resize(size, Image.Resampling.BICUBIC)
    return distance.point(table(lambda tone: 1 - strength * max(0.0, tone - 0.25) ** 1.5))


@_once_for_each_size
def torn_border(size: Size, width: float) -> Image.Image:
    """White where paint reaches, black where the paper stays bare along an uneven border."""
    inner = Image.new("L", size)
    edge = round(width)
    inner.paste(255, (edge, edge, max(edge + 1, size[0] - edge), max(edge + 1, size[1] - edge)))
    inner = inner.filter(ImageFilter.GaussianBlur(width * 0.7))
    uneven = ImageChops.add(blotches(size, width * 1.1, 11), blotches(size, width / 4, 12), 2)
    wet = ImageChops.add(inner, uneven, 1, -128)
    return wet.point(table(lambda tone: (tone - 0.36) * 9)).filter(ImageFilter.GaussianBlur(0.8))
