"""Styles made of lines and flat colour: pencil, cartoon, poster, pop art, neon."""

from __future__ import annotations

import math
from functools import lru_cache

from PIL import Image, ImageChops, ImageEnhance, ImageFilter, ImageOps

from prefect_flux_kontext.sandbox.textures import Size, blotches, dots, hatching, paper
from prefect_flux_kontext.sandbox.tones import curve, ramp, smooth, table, three, unit


def ink(picture: Image.Image, width: float, strength: float) -> Image.Image:
    """Contours as dark lines on white, grey.

    Args:
        picture: RGB or grey.
        width: Width of a line in pixels.
        strength: How readily a line appears: 5 is sparse, 15 dense.
    """
    grey = ImageOps.grayscale(picture)
    near = grey.filter(ImageFilter.GaussianBlur(width * 0.7))
    wide = grey.filter(ImageFilter.GaussianBlur(width * 2.2))
    fall = ImageChops.subtract(wide, near, 1 / strength)
    return ImageOps.invert(fall.point(ramp(0.2, 0.9)))


def pencil(picture: Image.Image) -> Image.Image:
    """Graphite on paper: contours, and hatching that grows denser with the shade."""
    length, size = unit(picture), picture.size
    grey = ImageOps.autocontrast(ImageOps.grayscale(picture), cutoff=1)
    shade = grey.filter(ImageFilter.GaussianBlur(2 * length))
    page = shade.point(table(lambda tone: 0.72 + 0.28 * min(1.0, tone * 1.6)))
    for angle, period, until in ((42, 3.0, 0.52), (-24, 3.4, 0.36), (75, 3.8, 0.22)):
        strokes = hatching(size, angle, max(1.5, period * length))
        # A stroke shows where the picture is darker than the stroke is light.
        shown = ImageChops.subtract(shade.point(ramp(0.0, until)), strokes, 0.9, 150)
        page = ImageChops.multiply(page, shown.point(table(lambda tone: 0.5 + 0.5 * tone)))
    contour = ink(grey, 1.4 * length, 8).point(table(lambda tone: 0.2 + 0.8 * tone))
    page = ImageChops.multiply(ImageChops.multiply(page, contour), paper(size))
    return ImageOps.colorize(page, (26, 26, 32), (255, 253, 246))


def cartoon(picture: Image.Image) -> Image.Image:
    """Cel shading: a few clear tones, bright colour, ink outlines."""
    length = unit(picture)
    soft = smooth(picture, 2)
    hue, saturation, value = smooth(soft, 3).convert("HSV").split()
    steps = 5

    def cel(tone: float) -> float:
        # Steps with short soft borders: hard ones show every pixel of noise.
        whole, rest = divmod(math.pow(tone, 0.8) * steps, 1)
        rest = min(1.0, max(0.0, (rest - 0.38) / 0.24))
        return 0.1 + 0.92 * (whole + rest) / steps

    value = value.point(table(cel))
    saturation = saturation.point(table(lambda tone: 1.45 * tone + 0.02))
    cels = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    lines = ink(soft, 1.6 * length, 8)
    return ImageChops.multiply(cels, ImageOps.colorize(lines, (26, 18, 38), "white"))


def poster(picture: Image.Image) -> Image.Image:
    """A screen print: four inks on cream paper, a little out of register."""
    length, size = unit(picture), picture.size
    grey = ImageOps.autocontrast(ImageOps.grayscale(smooth(picture, 3)), cutoff=2)
    grey = grey.filter(ImageFilter.GaussianBlur(1.5 * length))
    rough = blotches(size, max(1.5, 2.5 * length), 7).point(table(lambda tone: tone * 0.06))
    grey = ImageChops.add(grey, rough, 1, -8)
    sheet = Image.new("RGB", size, (250, 234, 203))
    plates = (
        ((247, 181, 56), 0.78),
        ((219, 74, 43), 0.57),
        ((30, 110, 122), 0.37),
        ((22, 32, 58), 0.2),
    )
    for step, (colour, until) in enumerate(plates):
        plate = ImageOps.invert(grey.point(ramp(until - 0.02, until + 0.02)))
        sheet.paste(colour, (round(step * 0.8 * length), 0), plate)
    return ImageChops.multiply(sheet, three(paper(size)))


def pop_art(picture: Image.Image) -> Image.Image:
    """A comic print: loud flat colours, dots for the half tones, thick black outlines."""
    length, size = unit(picture), picture.size
    soft = smooth(picture, 3)
    loud = ImageEnhance.Color(ImageOps.autocontrast(soft, cutoff=1)).enhance(2.4)
    flat = ImageOps.posterize(loud.point(curve(0.6) * 3), 2)
    flat = flat.point(table(lambda tone: tone * 1.33) * 3)
    grey = ImageOps.autocontrast(ImageOps.grayscale(soft), cutoff=2)
    screen = dots(size, max(4, round(10 * length)))
    halftone = ImageChops.subtract(grey.point(ramp(0.1, 0.75)), screen, 0.12, 128)
    flat = ImageChops.multiply(flat, ImageOps.colorize(halftone, (205, 40, 110), "white"))
    return ImageChops.multiply(flat, three(ink(soft, 2.4 * length, 8)))


def neon(picture: Image.Image) -> Image.Image:
    """Contours as glowing tubes over the darkened picture."""
    length, size = unit(picture), picture.size
    grey = ImageOps.autocontrast(ImageOps.grayscale(smooth(picture, 3)), cutoff=1)
    lines = ImageOps.invert(ink(grey, 1.6 * length, 11))
    lines = lines.filter(ImageFilter.GaussianBlur(0.7 * length))
    night = grey.point(table(lambda tone: tone**1.5 * 0.5))
    night = ImageOps.colorize(night, (6, 4, 20), (110, 80, 190))
    tubes = ImageChops.multiply(_tube_light(size), three(lines))
    # The halo is soft: a quarter of the size is enough, and quick.
    small = tubes.resize((max(1, size[0] // 4), max(1, size[1] // 4)), Image.Resampling.BOX)
    halo = ImageChops.add(
        small.filter(ImageFilter.GaussianBlur(1.3 * length)),
        small.filter(ImageFilter.GaussianBlur(5 * length)),
        0.7,
    ).resize(size, Image.Resampling.BICUBIC)
    glowing = ImageChops.screen(ImageChops.screen(night, halo), tubes)
    return ImageChops.add(glowing, three(lines.point(ramp(0.45, 1.3))))


@lru_cache(maxsize=8)
def _tube_light(size: Size) -> Image.Image:
    """The colours of neon from corner to corner: green, blue, violet, pink."""
    across = Image.linear_gradient("L").rotate(90).resize(size)
    slope = ImageChops.add(across, Image.linear_gradient("L").resize(size), 2)
    hue = slope.point(table(lambda tone: 0.47 + 0.5 * tone))
    full = Image.new("L", size, 255)
    return Image.merge("HSV", (hue, Image.new("L", size, 215), full)).convert("RGB")
