"""Result images: a reference restyled as the prompt asks, or a landscape without one."""

from __future__ import annotations

import hashlib
import io
import math
import random
import re
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter, ImageOps

from prefect_flux_kontext.sandbox.references import open_image


class Style(NamedTuple):
    """The name is a key of `STYLES`, or `tint`, with the hue in degrees."""

    name: str
    tint: int = 0


def choose_style(prompt: str) -> Style:
    """Choose the style that the prompt names, else a tint by the prompt's hash."""
    for name, (words, _) in STYLES.items():
        if re.search(rf"\b(?:{words})\b", prompt, re.IGNORECASE):
            return Style(name)
    return Style("tint", hashlib.sha256(prompt.encode()).digest()[0] % 24 * 15)


def paint(
    reference: bytes | None,
    prompt: str,
    style: Style,
    aspect_ratio: str,
    output_format: str,
    long_edge: int,
) -> bytes:
    """Paint one result image and encode it, without a reference as a landscape of the prompt."""
    across, down = map(int, aspect_ratio.split(":"))
    scale = long_edge / max(across, down)
    size = (max(1, round(across * scale)), max(1, round(down * scale)))
    if reference is None:
        picture = _draw_landscape(prompt, size)
    else:
        picture = ImageOps.fit(open_image(reference, long_edge), size, Image.Resampling.BICUBIC)
    if style.name in STYLES:
        picture = STYLES[style.name][1](picture)
    elif reference is not None:
        shadow, light = f"hsv({style.tint}, 85%, 36%)", f"hsv({style.tint + 160}, 25%, 100%)"
        picture = Image.blend(picture, ImageOps.colorize(_to_grey(picture), shadow, light), 0.7)
    encoded = io.BytesIO()
    picture.save(encoded, output_format, quality=88, compress_level=1)  # of JPEG, of PNG
    return encoded.getvalue()


def _table(tone: Callable[[float], float]) -> list[int]:
    """Make a table for `Image.point` from a function of brightness, 0 to 1 on both sides."""
    return [round(255 * min(1.0, max(0.0, tone(level / 255)))) for level in range(256)]


def _ramp(low: float, high: float) -> list[int]:
    """Make a table that takes `low` to black and `high` to white."""
    return _table(lambda tone: (tone - low) / (high - low))


def _step(tone: float, steps: int) -> float:
    """Round brightness to steps with short soft borders: hard ones show noise."""
    whole, rest = divmod(tone * steps, 1)
    return (whole + min(1.0, max(0.0, (rest - 0.35) / 0.3))) / steps


def _unit(picture: Image.Image) -> float:
    """Return a length in pixels that looks the same at every size: 1 at 1,024 pixels."""
    return max(picture.size) / 1024


def _blur(picture: Image.Image, radius: float) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(radius))


def _to_grey(picture: Image.Image) -> Image.Image:
    return ImageOps.autocontrast(ImageOps.grayscale(picture), cutoff=1)


def _saturate(picture: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Color(ImageOps.autocontrast(picture, preserve_tone=True)).enhance(factor)


def _flatten(picture: Image.Image, cell: int) -> Image.Image:
    """Remove detail but keep edges: a median filter at a fraction of the size, for speed."""
    return picture.reduce(cell).filter(ImageFilter.MedianFilter(3)).resize(picture.size)


def _outline(picture: Image.Image, width: float, strength: float) -> Image.Image:
    """Draw contours as dark lines on white; a strength of 5 gives few, 15 many."""
    grey = ImageOps.grayscale(picture)
    fall = ImageChops.subtract(_blur(grey, width * 2.2), _blur(grey, width * 0.7), 1 / strength)
    return ImageOps.invert(fall.point(_ramp(0.2, 0.9)))


# Textures depend on the size alone, and mostly one size is in use.
@lru_cache(maxsize=16)
def _noise(size: tuple[int, int], cell: float) -> Image.Image:
    """Make grey noise with blotches of about `cell` pixels."""
    width, height = (max(2, round(edge / cell)) for edge in size)
    noise = random.Random(cell).randbytes(width * height)
    return Image.frombytes("L", (width, height), noise).resize(size, Image.Resampling.BICUBIC)


@lru_cache(maxsize=4)
def _grain(size: tuple[int, int], strength: float) -> Image.Image:
    tones = _table(lambda tone: 0.5 + (tone - 0.5) * strength)
    return _noise(size, 1.2).point(tones).convert("RGB")


@lru_cache(maxsize=6)
def _hatching(size: tuple[int, int], angle: float, period: float) -> Image.Image:
    """Make strokes at an angle in degrees, about `period` pixels apart."""
    side = 2 * max(size)
    # Noise stretched along one axis looks like strokes.
    strokes = _noise((side // 18 + 2, side), period).resize((side, side))
    corner, strokes = side // 4, strokes.rotate(angle, Image.Resampling.BILINEAR)
    return strokes.crop((corner, corner, corner + size[0], corner + size[1]))


def _add_vignette(picture: Image.Image, strength: float) -> Image.Image:
    distance = Image.radial_gradient("L").resize(picture.size, Image.Resampling.BICUBIC)
    shade = distance.point(_table(lambda tone: 1 - strength * max(0.0, tone - 0.25) ** 1.5))
    return ImageChops.multiply(picture, shade.convert("RGB"))


def _lay_pieces(
    picture: Image.Image, side: float, jitter: float, joint: str, joint_width: float
) -> Image.Image:
    """Draw crooked squares of about `side` pixels with joints between them."""
    (width, height), rng = picture.size, random.Random(3)
    columns, rows = max(2, round(width / side)), max(2, round(height / side))
    small = picture.resize((columns, rows), Image.Resampling.BOX)
    corners = []
    for at in range((rows + 1) * (columns + 1)):
        y, x = divmod(at, columns + 1)
        x_moved, y_moved = x + rng.uniform(-jitter, jitter), y + rng.uniform(-jitter, jitter)
        corners.append((x_moved * width / columns, y_moved * height / rows))
    result, line_width = Image.new("RGB", picture.size), max(1, round(joint_width))
    draw = ImageDraw.Draw(result)
    for at, colour in enumerate(_read_colours(small)):
        upper, lower = at + at // columns, at + at // columns + columns + 1
        square = [*corners[upper : upper + 2], corners[lower + 1], corners[lower]]
        draw.polygon(square, colour)
    for row in range(rows + 1):
        draw.line(corners[row * (columns + 1) : (row + 1) * (columns + 1)], joint, line_width)
    for column in range(columns + 1):
        draw.line(corners[column :: columns + 1], joint, line_width)
    return result


def _read_colours(picture: Image.Image) -> list[tuple[int, int, int]]:
    data = picture.tobytes()  # RGB; Pillow's own name for this differs between releases
    return list(zip(data[::3], data[1::3], data[2::3], strict=True))


def _paint_stained_glass(picture: Image.Image) -> Image.Image:
    """Panes of coloured glass between dark lead lines, lit from behind."""
    unit = _unit(picture)
    window = _lay_pieces(_saturate(picture, 2), 24 * unit, 0.32, "black", 2.4 * unit)
    return ImageChops.add(window, _blur(window, 6 * unit), 1.7)


def _paint_mosaic(picture: Image.Image) -> Image.Image:
    """Small stones in pale mortar."""
    unit = _unit(picture)
    wall = _lay_pieces(_saturate(picture, 1.3), 13 * unit, 0.1, "#cec6b8", 2 * unit)
    return ImageChops.overlay(wall, _grain(picture.size, 0.5))


def _paint_watercolour(picture: Image.Image) -> Image.Image:
    """Washes with dark rims over a pencil sketch, on paper that stays white at its border."""
    unit, size = _unit(picture), picture.size
    wash = _saturate(_flatten(picture, 3), 1.4)
    wash = wash.point(_table(lambda tone: 0.2 + 0.4 * tone + 0.4 * _step(tone, 6)) * 3)
    grey = ImageOps.grayscale(wash)
    rim = ImageOps.invert(ImageChops.subtract(_blur(grey, 5 * unit), grey, 0.6))
    sketch = _outline(picture, 1.1 * unit, 6).point(_table(lambda tone: 0.5 + 0.5 * tone))
    wash = ImageChops.multiply(wash, ImageChops.multiply(rim, sketch).convert("RGB"))
    border, edge = Image.new("L", size), 24 * unit + 1
    ImageDraw.Draw(border).rectangle((edge, edge, size[0] - edge, size[1] - edge), 255)
    uneven = ImageChops.add(_noise(size, 26 * unit + 1), _noise(size, 6 * unit + 1), 2)
    border = ImageChops.add(_blur(border, 18 * unit), uneven, 1, -128).point(_ramp(0.36, 0.47))
    wash.paste("#fdfbf6", mask=ImageOps.invert(_blur(border, 0.8)))
    return ImageChops.overlay(wash, _grain(size, 0.3))


def _paint_pop_art(picture: Image.Image) -> Image.Image:
    """A comic print: loud flat colours, dots for the half tones, thick black outlines."""
    unit, soft = _unit(picture), _flatten(picture, 3)
    loud = _saturate(soft, 2.4).point(_table(lambda tone: _step(tone, 3)) * 3)
    # A chessboard, enlarged softly, is a screen of dots in diagonal rows.
    columns, rows = (math.ceil(edge / (5 * unit)) for edge in picture.size)
    board = bytes(255 * ((x + y) % 2) for y in range(rows) for x in range(columns))
    screen = Image.frombytes("L", (columns, rows), board).resize(picture.size)
    dots = ImageChops.subtract(_to_grey(soft).point(_ramp(0.1, 0.75)), screen, 0.12, 128)
    loud = ImageChops.multiply(loud, ImageOps.colorize(dots, "#cd286e", "white"))
    return ImageChops.multiply(loud, _outline(soft, 2.4 * unit, 8).convert("RGB"))


def _paint_poster(picture: Image.Image) -> Image.Image:
    """A screen print: four inks on cream paper, slightly out of register."""
    unit = _unit(picture)
    grey = _blur(_to_grey(_flatten(picture, 3)), 1.5 * unit)
    sheet = Image.new("RGB", picture.size, "#faeacb")
    inks = (("#f7b538", 0.78), ("#db4a2b", 0.57), ("#1e6e7a", 0.37), ("#16203a", 0.2))
    for step, (colour, until) in enumerate(inks):
        plate = ImageOps.invert(grey.point(_ramp(until - 0.02, until + 0.02)))
        sheet.paste(colour, (round(step * 0.8 * unit), 0), plate)
    return ImageChops.overlay(sheet, _grain(picture.size, 0.2))


def _paint_pencil(picture: Image.Image) -> Image.Image:
    """Graphite on paper: contours, and hatching that grows denser with the shade."""
    unit, grey = _unit(picture), _to_grey(picture)
    shade = _blur(grey, 2 * unit)
    page = ImageChops.multiply(grey.point(_ramp(-2.0, 0.7)), _outline(grey, 1.4 * unit, 8))
    for angle, period, until in ((42, 3.0, 0.52), (-24, 3.4, 0.36), (75, 3.8, 0.22)):
        strokes = _hatching(picture.size, angle, max(1.5, period * unit))
        # A stroke shows where the picture is darker than the stroke is light.
        shown = ImageChops.subtract(shade.point(_ramp(0.0, until)), strokes, 0.9, 150)
        page = ImageChops.multiply(page, shown.point(_table(lambda tone: 0.5 + 0.5 * tone)))
    return ImageOps.colorize(page, "#1a1a20", "#fcfaf4")


def _paint_oil(picture: Image.Image) -> Image.Image:
    """Brush strokes along the forms in relief: broad first, fine where there is detail."""
    unit, rng = _unit(picture), random.Random(1)
    rich = _saturate(picture, 1.35)
    canvas = _flatten(rich, 4)
    draw = ImageDraw.Draw(canvas)
    for cell, least_slope in ((12, 0), (7, 8), (4.5, 30)):
        columns, rows = (max(2, round(edge / (cell * unit))) for edge in picture.size)
        small = rich.resize((columns, rows), Image.Resampling.BOX)
        colours = _read_colours(small)
        grey = _blur(ImageOps.grayscale(small), 1).tobytes()
        width, reach = max(1, round(cell * unit)), cell * unit * 1.5
        for at in rng.sample(range(columns * rows), columns * rows):
            right, below = grey[at] - grey[at - 1], grey[at] - grey[at - columns]
            if abs(right) + abs(below) < least_slope:
                continue
            x = (at % columns + rng.random()) * picture.width / columns
            y = (at // columns + rng.random()) * picture.height / rows
            # Along the form; in slow waves where there is none.
            angle = math.atan2(right + 2 * math.sin(x / unit / 150), 2 - below)
            dx, dy = math.cos(angle) * reach, math.sin(angle) * reach
            (red, green, blue), light = colours[at], rng.randrange(-14, 15)
            fill = red + light, green + light, blue + light
            draw.line((x - dx, y - dy, x + dx, y + dy), fill, width)
    relief = ImageOps.grayscale(canvas).filter(ImageFilter.EMBOSS)
    return ImageChops.overlay(canvas, relief.convert("RGB"))


def _paint_cartoon(picture: Image.Image) -> Image.Image:
    """Cel shading: a few clear tones, bright colours, ink outlines."""
    soft = _flatten(picture, 2)
    hue, saturation, value = _flatten(soft, 3).convert("HSV").split()
    saturation = saturation.point(_table(lambda tone: 1.45 * tone + 0.02))
    value = value.point(_table(lambda tone: 0.1 + 0.92 * _step(tone**0.8, 5)))
    cels = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    return ImageChops.multiply(cels, _outline(soft, 1.6 * _unit(picture), 8).convert("RGB"))


def _paint_noir(picture: Image.Image) -> Image.Image:
    """Hard black and white with glowing lights, dark corners and grain."""
    grey = _to_grey(picture).point(_table(lambda tone: tone**2 * (2.2 - 1.2 * tone)))
    glow = _blur(grey, 12 * _unit(picture)).point(_table(lambda tone: (tone - 0.45) * 0.6))
    noir = ImageChops.screen(grey, glow).convert("RGB")
    return _add_vignette(ImageChops.overlay(noir, _grain(picture.size, 0.3)), 0.9)


def _paint_vintage(picture: Image.Image) -> Image.Image:
    """A faded print: sepia, milky blacks, dark corners and grain."""
    sepia = ImageOps.colorize(_to_grey(picture), "#3a261e", "#fff0d0", "#a47a52")
    faded = ImageChops.overlay(Image.blend(picture, sepia, 0.85), _grain(picture.size, 0.3))
    return _add_vignette(faded, 0.6)


def _paint_neon(picture: Image.Image) -> Image.Image:
    """Contours as glowing tubes over the darkened picture."""
    unit, grey = _unit(picture), _to_grey(_flatten(picture, 3))
    lines = _blur(ImageOps.invert(_outline(grey, 1.6 * unit, 11)), 0.7 * unit)
    across = Image.linear_gradient("L").rotate(90).resize(picture.size)
    light = ImageOps.colorize(across, "#14f0ff", "#ff1eaa", "#6e50ff")
    tubes = ImageChops.multiply(light, lines.convert("RGB"))
    small = tubes.reduce(4)
    halo = ImageChops.add(_blur(small, unit), _blur(small, 5 * unit), 0.7).resize(picture.size)
    dark = ImageOps.colorize(grey, "#060414", "#42306e", "#1a1334")
    return ImageChops.screen(dark, ImageChops.screen(halo, tubes))


STYLES: dict[str, tuple[str, Callable[[Image.Image], Image.Image]]] = {
    "stained glass": (r"stained[ -]glass|leadlight", _paint_stained_glass),
    "mosaic": (r"mosaics?|tessera[e]?|tiles?", _paint_mosaic),
    "watercolour": (r"water[ -]?colou?rs?|aquarelle|gouache", _paint_watercolour),
    "pop art": (r"pop[ -]?art|comics?|halftone|warhol|lichtenstein", _paint_pop_art),
    "poster": (r"posters?|screen[ -]?prints?|linocut|risograph|silk[ -]?screen", _paint_poster),
    "pencil": (r"pencils?|sketch\w*|drawings?|drawn|charcoal|graphite|etching", _paint_pencil),
    "oil": (
        r"oils?|impasto|van gogh|impressionis\w+|acrylic|brush ?strokes?|painting",
        _paint_oil,
    ),
    "cartoon": (r"anime|cartoons?|ghibli|manga|toon|cel[ -]shad\w+", _paint_cartoon),
    "noir": (r"noir|black[ -]and[ -]white|b&w|monochrome|grayscale|greyscale", _paint_noir),
    "vintage": (r"vintage|sepia|retro|antique|daguerreo\w+|old photo\w*|polaroid", _paint_vintage),
    "neon": (r"neon|cyberpunk|synthwave|vaporwave|glow\w*", _paint_neon),
}
"""By name, the words that ask for a style and its function. The first that fits a prompt wins."""


def _draw_landscape(prompt: str, size: tuple[int, int]) -> Image.Image:
    """Draw sky, sun and hazy ridges, whose colours and shapes follow from the prompt's hash."""
    rng = random.Random(hashlib.sha256(prompt.encode()).hexdigest())
    above = f"hsv({rng.randrange(190, 310)}, 60%, {rng.randrange(20, 95)}%)"
    hue, horizon = rng.randrange(80, 310), f"hsv({rng.randrange(180, 420)}, 28%, 96%)"
    # Drawn larger and reduced: Pillow draws edges without smoothing.
    width, height = size[0] * 2, size[1] * 2
    sky = Image.linear_gradient("L").resize((width, height))
    picture = ImageOps.colorize(sky, above, horizon)
    draw = ImageDraw.Draw(picture)
    x, y, radius = width * rng.uniform(0.2, 0.8), height * rng.uniform(0.15, 0.35), width / 25
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), "#fffae2")
    for ridge in range(1, 6):
        waves = [(n * rng.uniform(2, 7), rng.uniform(0, math.tau), 0.1 / n) for n in range(1, 9)]
        line = []
        for x in range(0, width + 8, 8):
            hills = sum(math.sin(dense * x / width + turn) * high for dense, turn, high in waves)
            line.append((x, height * (0.45 + 0.09 * ridge + hills)))
        draw.polygon(
            [*line, (width + 8, height), (0, height)],
            f"hsv({hue}, {10 + 9 * ridge}%, {90 - 13 * ridge}%)",
        )
    return picture.resize(size, Image.Resampling.BOX)
