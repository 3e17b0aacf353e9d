"""Many pictures on one, in rows and columns with their names."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont, ImageOps

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_CELL = (256, 192)
_CAPTION = 24
_PAPER = (250, 249, 246)
_INK = (40, 40, 48)


def contact_sheet(rows: Sequence[Sequence[tuple[str, Path | IO[bytes]]]]) -> Image.Image:
    """Draw a sheet with one row of pictures for each row of captions and files.

    Returns:
        An RGB image of 256 x 216 pixels for each picture of the longest row.
    """
    width, height = _CELL[0], _CELL[1] + _CAPTION
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * width, len(rows) * height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    for top, row in enumerate(rows):
        for left, (caption, file) in enumerate(row):
            with Image.open(file) as image:
                # A JPEG decodes several times faster at the size it is wanted in.
                image.draft("RGB", _CELL)
                picture = ImageOps.pad(image.convert("RGB"), _CELL, color=_PAPER)
            sheet.paste(picture, (left * width, top * height))
            place = (left * width + width // 2, top * height + _CELL[1] + _CAPTION // 2)
            draw.text(place, _fitting(caption, font), fill=_INK, font=font, anchor="mm")
    return sheet


def _fitting(caption: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The caption, with its middle left out where it is wider than its picture."""
    kept = len(caption)
    told = caption
    while kept > 1 and font.getlength(told) > _CELL[0] - 12:
        kept -= 1
        told = f"{caption[: (kept + 1) // 2]}…{caption[len(caption) - kept // 2 :]}"
    return told
