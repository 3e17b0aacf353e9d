"""Landscapes drawn from nothing but a prompt, for text to image."""

from __future__ import annotations

import hashlib
import math
import random
import re
from typing import NamedTuple

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

from prefect_flux_kontext.sandbox.textures import Size, noise
from prefect_flux_kontext.sandbox.tones import Colour, rgb, table


class _Light(NamedTuple):
    """An hour of the day: colours of the sky from top to horizon, of the sun and of the land."""

    top: Colour
    horizon: Colour
    sun: Colour
    land: Colour


_LIGHTS = {
    "night": _Light((8, 12, 38), (48, 62, 110), (240, 240, 225), (10, 16, 34)),
    "sunset": _Light((58, 48, 108), (255, 158, 94), (255, 226, 150), (46, 26, 54)),
    "dawn": _Light((112, 146, 200), (255, 206, 190), (255, 244, 214), (62, 74, 104)),
    "day": _Light((66, 138, 214), (206, 232, 244), (255, 250, 226), (40, 92, 62)),
    "winter": _Light((142, 170, 200), (232, 236, 240), (255, 252, 240), (92, 112, 140)),
}
_HOURS = {
    "night": r"night|moon\w*|stars?|starry|midnight|dark",
    "sunset": r"sunset|dusk|evening|golden|autumn|desert|fire",
    "dawn": r"dawn|sunrise|morning|mist\w*|fog\w*|pastel",
    "winter": r"snow\w*|winter|ice|arctic|frost\w*",
    "day": r"day|noon|summer|spring|sunny|meadow|sky",
}
_WATER = re.compile(r"\b(?:sea|ocean|lakes?|rivers?|beach|water|coast|harbou?r)\b", re.IGNORECASE)
_TREES = re.compile(r"\b(?:forest|trees?|woods?|jungle|pines?|woodland)\b", re.IGNORECASE)
_RIDGES = 5
_LARGER = 1.5


def draw_scene(prompt: str, size: Size) -> Image.Image:
    """A landscape: sky, sun or moon, clouds, ridges in the haze, perhaps trees and a lake.

    Words of the prompt choose the hour, water and trees; its hash decides everything else, so
    that the same prompt gives the same picture at every size.

    Args:
        prompt: The prompt.
        size: Width and height in pixels.
    """
    dice = random.Random(hashlib.sha256(prompt.encode()).hexdigest())
    hour = next((name for name, words in _HOURS.items() if _says(words, prompt)), None)
    hour = hour or dice.choice(list(_LIGHTS))
    light = _LIGHTS[hour]
    water = bool(_WATER.search(prompt)) or dice.randrange(3) == 0
    trees = bool(_TREES.search(prompt)) or dice.randrange(2) == 0
    # Drawn larger and reduced: Pillow draws edges without smoothing.
    width, height = round(size[0] * _LARGER), round(size[1] * _LARGER)
    shore = round(height * (dice.uniform(0.68, 0.76) if water else 1.0))
    picture = _sky((width, height), light, hour, shore, dice)
    draw = ImageDraw.Draw(picture)
    for ridge in range(_RIDGES):
        near = (ridge + 1) / _RIDGES
        base = shore * (0.62 + 0.34 * near * near) if water else height * (0.5 + 0.42 * near)
        swing = height * (0.16 - 0.08 * near)
        line = _ridge_line(width, base, swing, rough=1.4 - near, dice=dice)
        colour = _mix(light.horizon, _vary(light.land, dice), 0.16 + 0.8 * near**1.2)
        draw.polygon([(0, shore), *line, (width, shore)], fill=colour)
        if trees and ridge >= _RIDGES - 2:
            _plant(draw, line, colour, height * (0.03 + 0.05 * near), dice)
    if water:
        _flood(picture, shore, light)
    return picture.resize(size, Image.Resampling.BICUBIC)


def _says(words: str, prompt: str) -> bool:
    return re.search(rf"\b(?:{words})\b", prompt, re.IGNORECASE) is not None


def _sky(size: Size, light: _Light, hour: str, shore: int, dice: random.Random) -> Image.Image:
    """Sky down to the horizon with sun or moon, their glow, clouds and, at night, stars."""
    width, height = size
    fade = Image.linear_gradient("L").resize(size).point(table(lambda tone: (tone * 1.4) ** 0.9))
    sky = ImageOps.colorize(fade, light.top, light.horizon)
    x = width * dice.uniform(0.2, 0.8)
    y = shore * dice.uniform(0.2, 0.5)
    radius = max(size) * dice.uniform(0.025, 0.045)
    if hour == "night":
        draw = ImageDraw.Draw(sky)
        for _ in range(260):
            star, dot = (
                (dice.uniform(0, width), dice.uniform(0, shore * 0.7)),
                dice.uniform(0.6, 2.4),
            )
            dot *= max(size) / 2048
            grey = dice.randint(120, 255)
            draw.ellipse(
                (star[0] - dot, star[1] - dot, star[0] + dot, star[1] + dot), (grey, grey, grey)
            )
    sky = ImageChops.screen(sky, _clouds(size, dice))
    # The glow at an eighth of the size: it is soft anyway.
    glow = Image.new("L", (max(1, width // 8), max(1, height // 8)))
    spread = radius * 1.6
    box = [edge / 8 for edge in (x - spread, y - spread, x + spread, y + spread)]
    ImageDraw.Draw(glow).ellipse(box, fill=210)
    glow = ImageChops.add(
        glow.filter(ImageFilter.GaussianBlur(radius / 7)),
        glow.filter(ImageFilter.GaussianBlur(radius / 2)).point(table(lambda tone: tone * 1.6)),
    ).resize(size, Image.Resampling.BILINEAR)
    sky.paste(light.sun, (0, 0), glow.point(table(lambda tone: tone * 0.75)))
    ImageDraw.Draw(sky).ellipse((x - radius, y - radius, x + radius, y + radius), light.sun)
    return sky


def _clouds(size: Size, dice: random.Random) -> Image.Image:
    """Long clouds from three layers of soft noise: grey on black, as RGB."""
    small = (max(4, size[0] // 4), max(4, size[1] // 4))
    seed = dice.randrange(1 << 30)
    layers = [
        noise((max(2, cells), max(2, cells * 2 * size[1] // size[0])), seed + cells).resize(
            small, Image.Resampling.BICUBIC
        )
        for cells in (4, 9, 20)
    ]
    cover = ImageChops.blend(ImageChops.blend(layers[0], layers[1], 0.4), layers[2], 0.22)
    threshold = dice.uniform(0.5, 0.62)
    wisps = cover.point(table(lambda tone: min(0.5, (tone - threshold) * 2.2)))
    # Clouds thin out towards the horizon.
    thin = ImageOps.invert(Image.linear_gradient("L").resize(small))
    wisps = ImageChops.multiply(wisps, thin.point(table(lambda tone: tone * 1.5)))
    return wisps.resize(size, Image.Resampling.BILINEAR).convert("RGB")


def _ridge_line(
    width: int, base: float, swing: float, rough: float, dice: random.Random
) -> list[tuple[float, float]]:
    """The outline of a ridge: waves, each half as high and about twice as dense as the last."""
    waves = [
        (
            swing * rough**octave / 1.9**octave,
            1.9**octave * dice.uniform(1.2, 2.2),
            dice.uniform(0, math.tau),
        )
        for octave in range(6)
    ]
    step = max(2, width // 400)
    return [
        (
            x,
            base
            + sum(high * math.sin(dense * math.pi * x / width + at) for high, dense, at in waves),
        )
        for x in range(0, width + step, step)
    ]


def _plant(
    draw: ImageDraw.ImageDraw,
    line: list[tuple[float, float]],
    colour: Colour,
    tall: float,
    dice: random.Random,
) -> None:
    """Firs along a ridge, in groves."""
    darker = _mix(colour, (8, 14, 16), 0.3)
    grove, dense = dice.uniform(0, math.tau), dice.uniform(0.02, 0.04)
    for at, (x, y) in enumerate(line):
        if math.sin(at * dense + grove) + dice.uniform(-0.6, 0.6) < 0:
            continue
        high = tall * dice.uniform(0.5, 1.0)
        for layer in range(3):
            top = y - high * (1 - layer * 0.26)
            half = high * (0.11 + 0.06 * layer)
            draw.polygon(
                [(x, top), (x - half, top + high * 0.44), (x + half, top + high * 0.44)], darker
            )


def _flood(picture: Image.Image, shore: int, light: _Light) -> None:
    """Turns what is below the shore into a lake that mirrors what is above it."""
    width, height = picture.size
    depth = height - shore
    above = picture.crop((0, max(0, shore - depth * 2), width, shore))
    mirrored = ImageOps.flip(above).resize((width, depth), Image.Resampling.BILINEAR)
    # Ripples: rows move sideways, farther the nearer they are.
    rows = max(2, height // 180)
    for top in range(0, depth, rows):
        row = mirrored.crop((0, top, width, min(depth, top + rows)))
        sway = math.sin(top * 0.9) * (2 + 14 * top / depth) * width / 2048
        mirrored.paste(ImageChops.offset(row, round(sway), 0), (0, top))
    deep = Image.new("RGB", mirrored.size, _mix(light.top, light.land, 0.4))
    shade = Image.linear_gradient("L").resize(mirrored.size)
    mirrored.paste(deep, (0, 0), shade.point(table(lambda tone: 0.15 + 0.5 * tone)))
    picture.paste(mirrored, (0, shore))


def _mix(one: Colour, other: Colour, share: float) -> Colour:
    red, green, blue = (
        round(left + (right - left) * share) for left, right in zip(one, other, strict=True)
    )
    return red, green, blue


def _vary(colour: Colour, dice: random.Random) -> Colour:
    """The colour with a little of another hue in it."""
    return _mix(colour, rgb(dice.random(), 0.5, 0.4), 0.14)
