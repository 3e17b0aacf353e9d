"""Styles from the darkroom: noir, vintage and split tones."""

from __future__ import annotations

from PIL import Image, ImageChops, ImageEnhance, ImageFilter, ImageOps

from prefect_flux_kontext.sandbox.textures import grain, vignette
from prefect_flux_kontext.sandbox.tones import curve, rgb, table, three, unit


def noir(picture: Image.Image) -> Image.Image:
    """Hard black and white with glowing lights, deep corners and grain."""
    grey = ImageOps.autocontrast(ImageOps.grayscale(picture), cutoff=1).point(curve(0.9))
    lights = grey.filter(ImageFilter.GaussianBlur(12 * unit(picture)))
    grey = ImageChops.screen(grey, lights.point(table(lambda tone: max(0.0, tone - 0.45) * 0.6)))
    grey = grey.point(table(lambda tone: tone**1.3))
    grey = ImageChops.overlay(grey, grain(picture.size, 0.4))
    return three(ImageChops.multiply(grey, vignette(picture.size, 0.9)))


def vintage(picture: Image.Image) -> Image.Image:
    """A faded print: sepia, milky blacks, dark corners and a light leak."""
    size = picture.size
    grey = ImageOps.autocontrast(ImageOps.grayscale(picture), cutoff=0.5).point(curve(0.2))
    sepia = ImageOps.colorize(grey, (58, 38, 30), (255, 240, 208), mid=(164, 122, 82))
    print_ = Image.blend(ImageEnhance.Color(picture).enhance(0.7), sepia, 0.78)
    print_ = ImageChops.multiply(print_, three(vignette(size, 0.55)))
    far = Image.radial_gradient("L").resize((size[0] * 2, size[1] * 2))
    # A quarter of the gradient: the light comes in at the upper right corner.
    leak = far.crop((0, size[1], size[0], size[1] * 2))
    leak = leak.point(table(lambda tone: max(0.0, 0.62 - tone) ** 1.5))
    print_ = ImageChops.screen(print_, ImageOps.colorize(leak, "black", (255, 140, 60)))
    return ImageChops.overlay(print_, three(grain(size, 0.3)))


def split_tone(picture: Image.Image, hue: float) -> Image.Image:
    """A dreamy grade: shadows of one hue, lights of another, soft glow.

    Args:
        picture: RGB.
        hue: The shadows' hue, 0 to 1.
    """
    grey = ImageOps.autocontrast(ImageOps.grayscale(picture), cutoff=0.5).point(curve(0.25))
    toned = ImageOps.colorize(
        grey, rgb(hue, 0.8, 0.2), rgb(hue + 0.45, 0.18, 1.0), mid=rgb(hue + 0.1, 0.45, 0.66)
    )
    mixed = Image.blend(ImageEnhance.Color(picture).enhance(1.15), toned, 0.7)
    glow = mixed.filter(ImageFilter.GaussianBlur(12 * unit(picture)))
    return Image.blend(mixed, ImageChops.screen(mixed, glow), 0.25)
