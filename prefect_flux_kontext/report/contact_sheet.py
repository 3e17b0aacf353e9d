"""Many pictures on one, in rows and columns with their names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont, ImageOps

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_CELL = (256, 192)
_CAPTION = 24
_PAPER = (250, 249, 246)
_INK = (40, 40, 48)


def contact_sheet(rows: Sequence[Mapping[str, Path]]) -> Image.Image:
    """Draw a sheet with one row of pictures for each mapping from caption to file.

    Returns:
        An RGB image of 256 x 216 pixels for each picture of the longest row.
    """
    width, height = _CELL[0], _CELL[1] + _CAPTION
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * width, len(rows) * height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    for top, row in enumerate(rows):
        for left, (caption, path) in enumerate(row.items()):
            with Image.open(path) as image:
                # A JPEG decodes several times faster at the size it is wanted in.
                image.draft("RGB", _CELL)
                picture = ImageOps.pad(image.convert("RGB"), _CELL, color=_PAPER)
            sheet.paste(picture, (left * width, top * height))
            place = (left * width + width // 2, top * height + _CELL[1] + _CAPTION // 2)
            draw.text(place, caption, fill=_INK, font=font, anchor="mm")
    return sheet
