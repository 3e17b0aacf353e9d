"""Build the gallery and the contact sheet of an output from its result manifest."""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import logging
import math
import secrets
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont, ImageOps

from prefect_flux_kontext.report.gallery.page import GalleryRows, render_page
from prefect_flux_kontext.report.gallery.thumbnails import GALLERY_FOLDER, ThumbnailStore
from prefect_flux_kontext.report.results import RESULTS_JSONL, read_lines
from prefect_flux_kontext.report.statistics import Statistics
from prefect_flux_kontext.report.thumbnails import RESULT_EDGE_PIXELS, make_thumbnail

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from prefect_flux_kontext.storage.filesystem import OutputFolder

logger = logging.getLogger(__name__)

GALLERY = "gallery.html"
CONTACT_SHEET = f"{GALLERY_FOLDER}/contact-sheet.png"
"""The contact sheet, in a folder of the package, so that no row's image can have its name."""

# A page with the thumbnails of this many rows is still small enough to send as one file.
_MAX_EMBEDDED_ROWS = 150

_SHEET_IMAGES = 48
_SHEET_COLUMNS = 6

# Pixels of the contact sheet.
_CELL_SIZE = (256, 192)
_CAPTION_HEIGHT = 24
_CAPTION_MARGIN = 12
_BACKGROUND = (250, 249, 246)
_TEXT_COLOR = (40, 40, 48)

# Images that are read from the output at a time, each of up to 50 MB.
_PARALLEL_IMAGES = 8


async def build_gallery(
    output: OutputFolder,
    results: Path,
    thumbnails: ThumbnailStore,
    *,
    max_rows: int,
    max_new_thumbnails: int,
    statistics: Statistics | None = None,
) -> Statistics:
    """Write gallery and contact sheet of an output, whose result manifest is on this machine.

    The page has at most `max_rows` rows. At most `max_new_thumbnails` are made from images in the
    output. Without the `statistics` of the results, they are counted; they are returned.

    Raises:
        LedgerError: The thumbnails cannot be read or written.
        StorageError: The output cannot be written to.
    """
    rows, counted = await asyncio.to_thread(_read_rows, results, statistics, max_rows)
    await thumbnails.load_index()
    await _make_missing(output, rows, thumbnails, max_new_thumbnails)
    results_shown = [name for name in rows.after if name in thumbnails.files]
    all_shown = [name for name in (*rows.after, *rows.before) if name in thumbnails.files]
    is_embedded = len(rows) <= _MAX_EMBEDDED_ROWS
    urls = await thumbnails.load(all_shown if is_embedded else results_shown[:_SHEET_IMAGES])
    pieces = render_page(
        rows,
        output,
        statistics=counted.summarize(),
        files={} if is_embedded else {name: thumbnails.files[name] for name in all_shown},
        embedded=urls if is_embedded else {},
    )
    with tempfile.TemporaryDirectory(prefix="flux-kontext-") as private:
        file = Path(private, "page")
        await asyncio.to_thread(_write, pieces, file)
        await output.put(GALLERY, file)
    if results_shown:
        sheet = await asyncio.to_thread(_draw_sheet_of_rows, rows, urls)
        await output.write(CONTACT_SHEET, sheet)
    return counted


async def draw_run_sheet(output: OutputFolder, run: str) -> bytes | None:
    """Draw the first images that a run has stored; returns a PNG, or None without any.

    Raises:
        StorageError: The output cannot be read.
        Exception: An image is invalid. Decoders raise many types of errors.
    """
    with tempfile.TemporaryDirectory(prefix="flux-kontext-") as private:
        results = Path(private, "results")
        await output.fetch(RESULTS_JSONL, results)
        own = (line for line in read_lines(results) if line["run"] == run and line.get("file"))
        lines = list(itertools.islice(own, _SHEET_IMAGES))
    cells = []
    for line in lines:
        if (image := await output.read(line["file"])) is not None:
            small = await asyncio.to_thread(make_thumbnail, image, RESULT_EDGE_PIXELS)
            cells.append((_describe_cell(line["id"], line.get("style")), io.BytesIO(small)))
    return await asyncio.to_thread(_draw_cells, cells) if cells else None


def _read_rows(
    results: Path, statistics: Statistics | None, max_rows: int
) -> tuple[GalleryRows, Statistics]:
    """Read the first rows, and all of them if the statistics are still to be counted."""
    rows, lines = GalleryRows(), read_lines(results)
    if statistics is None:
        statistics = Statistics()
        lines = statistics.count(lines)
    else:
        lines = itertools.islice(lines, max_rows)
    for line in lines:
        if len(rows) < max_rows:
            rows.add(line)
    return rows, statistics


def _write(pieces: Iterable[str], file: Path) -> None:
    with file.open("w", encoding="utf-8") as page_file:
        page_file.writelines(pieces)


async def _make_missing(
    output: OutputFolder, rows: GalleryRows, thumbnails: ThumbnailStore, most: int
) -> None:
    """Make thumbnails of images in the output that have none, at most `most`."""
    missing = {
        name: file
        for name, file in zip(rows.after, rows.columns["file"], strict=True)
        if name and file and name not in thumbnails.files
    }
    made: dict[str, bytes] = {}

    async def make(name: str, file: str) -> None:
        try:
            if (image := await output.read(file)) is not None:
                made[name] = await asyncio.to_thread(make_thumbnail, image, RESULT_EDGE_PIXELS)
        except Exception as error:  # noqa: BLE001 - decoders raise many types of errors
            logger.warning("No thumbnail of %s for the gallery: %s", file, error)

    chosen = list(missing.items())[:most]
    for start in range(0, len(chosen), _PARALLEL_IMAGES):
        await asyncio.gather(*(make(*item) for item in chosen[start : start + _PARALLEL_IMAGES]))
    if made:
        await thumbnails.add(f"made-{secrets.token_hex(6)}", made)
        await thumbnails.load_index()
    if len(missing) > most:
        logger.warning(
            "%d images have no thumbnail in the gallery yet. To make them: "
            "flux-kontext gallery %s",
            len(missing) - most,
            output,
        )


def _draw_sheet_of_rows(rows: GalleryRows, urls: dict[str, str]) -> bytes:
    """Draw the first thumbnails of results, given as data URLs."""
    columns = rows.columns["id"], rows.columns["style"], rows.after
    cells = [
        (_describe_cell(row_id, style), io.BytesIO(base64.b64decode(urls[name].partition(",")[2])))
        for row_id, style, name in zip(*columns, strict=True)
        if name in urls
    ]
    return _draw_cells(cells[:_SHEET_IMAGES])


def _describe_cell(row_id: str, style: str | None) -> str:
    return f"{row_id} · {style}" if style else row_id


def _draw_cells(cells: list[tuple[str, io.BytesIO]]) -> bytes:
    """Draw a contact sheet as a PNG."""
    # As wide as high, so that pages which shrink it leave its captions readable.
    columns = min(_SHEET_COLUMNS, math.isqrt(len(cells) - 1) + 1)
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    file = io.BytesIO()
    draw_contact_sheet(rows).save(file, "PNG", compress_level=4)
    return file.getvalue()


def draw_contact_sheet(rows: Sequence[Sequence[tuple[str, Path | IO[bytes]]]]) -> Image.Image:
    """Draw captions and images in rows, in RGB, with 256 x 216 pixels for each image."""
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
