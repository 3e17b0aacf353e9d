"""A contact sheet: images in rows and columns, with captions."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont, ImageOps

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

# Pixels.
_CELL_SIZE = (256, 192)
_CAPTION_HEIGHT = 24
_CAPTION_MARGIN = 12

_BACKGROUND = (250, 249, 246)
_TEXT_COLOR = (40, 40, 48)


def draw_contact_sheet(rows: Sequence[Sequence[tuple[str, Path | IO[bytes]]]]) -> Image.Image:
    """Draw a contact sheet.

    Args:
        rows: The rows of the sheet, each a sequence of captions and image files.

    Returns:
        An RGB image, with 256 x 216 pixels for each image of the longest row.
    """
    width, height = _CELL_SIZE[0], _CELL_SIZE[1] + _CAPTION_HEIGHT
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * width, len(rows) * height), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    for top, row in enumerate(rows):
        for left, (caption, file) in enumerate(row):
            with Image.open(file, formats=("JPEG", "PNG", "WEBP")) as image:
                # A JPEG decodes several times faster at a reduced size.
                image.draft("RGB", _CELL_SIZE)
                cell = ImageOps.pad(image.convert("RGB"), _CELL_SIZE, color=_BACKGROUND)
            sheet.paste(cell, (left * width, top * height))
            center = (
                left * width + width // 2,
                top * height + _CELL_SIZE[1] + _CAPTION_HEIGHT // 2,
            )
            text = _shorten(caption, font)
            draw.text(center, text, fill=_TEXT_COLOR, font=font, anchor="mm")
    return sheet


def _shorten(caption: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Replace the middle of a caption by an ellipsis if it is wider than its image."""
    kept = len(caption)
    text = caption
    while kept > 1 and font.getlength(text) > _CELL_SIZE[0] - _CAPTION_MARGIN:
        kept -= 1
        text = f"{caption[: (kept + 1) // 2]}…{caption[len(caption) - kept // 2 :]}"
    return text
