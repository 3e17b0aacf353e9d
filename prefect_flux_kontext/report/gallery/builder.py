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
from typing import TYPE_CHECKING

from prefect_flux_kontext.report.gallery.contact_sheet import draw_contact_sheet
from prefect_flux_kontext.report.gallery.page import GalleryRows, render_page
from prefect_flux_kontext.report.gallery.thumbnails import GALLERY_FOLDER
from prefect_flux_kontext.report.results import RESULTS_JSONL, read_lines
from prefect_flux_kontext.report.statistics import Statistics
from prefect_flux_kontext.report.thumbnails import RESULT_EDGE_PIXELS, make_thumbnail

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prefect_flux_kontext.report.gallery.thumbnails import ThumbnailStore
    from prefect_flux_kontext.storage.filesystem import OutputFolder

logger = logging.getLogger(__name__)

GALLERY = "gallery.html"
CONTACT_SHEET = f"{GALLERY_FOLDER}/contact-sheet.png"
"""The contact sheet, in a folder of the package, so that no row's image can have its name."""

# A page with the thumbnails of this many rows is still small enough to send as one file.
_MAX_EMBEDDED_ROWS = 150

_SHEET_IMAGES = 48
_SHEET_COLUMNS = 6

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
    """Write gallery and contact sheet, and return the statistics of the results.

    Args:
        output: The batch's output.
        results: The result manifest of the output, on this machine.
        thumbnails: The gallery's thumbnails.
        max_rows: The most rows on the page.
        max_new_thumbnails: The most thumbnails to make from images in the output.
        statistics: Those of the results; None to count them.

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
        title=str(output).rstrip("/").rpartition("/")[2],
        folder=GALLERY_FOLDER,
        statistics=counted.summarize(),
        files={} if is_embedded else {name: thumbnails.files[name] for name in all_shown},
        embedded=urls if is_embedded else {},
    )
    with tempfile.TemporaryDirectory(prefix="flux-kontext-") as private:
        file = Path(private, "page")
        await asyncio.to_thread(_write, pieces, file)
        await output.put(GALLERY, file)
    if results_shown:
        sheet = await asyncio.to_thread(_draw_contact_sheet, rows, urls)
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
        lines = [line for line in read_lines(results) if line["run"] == run and line.get("file")][
            :_SHEET_IMAGES
        ]
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


def _draw_contact_sheet(rows: GalleryRows, urls: dict[str, str]) -> bytes:
    """Draw the first thumbnails of results, given as data URLs; returns a PNG."""
    cells = [
        (
            _describe_cell(row_id, style),
            io.BytesIO(base64.b64decode(urls[name].partition(",")[2])),
        )
        for row_id, style, name in zip(
            rows.columns["id"], rows.columns["style"], rows.after, strict=True
        )
        if name in urls
    ][:_SHEET_IMAGES]
    return _draw_cells(cells)


def _describe_cell(row_id: str, style: str | None) -> str:
    return f"{row_id} · {style}" if style else row_id


def _draw_cells(cells: list[tuple[str, io.BytesIO]]) -> bytes:
    # As wide as high, so that pages which shrink it leave its captions readable.
    columns = min(_SHEET_COLUMNS, math.isqrt(len(cells) - 1) + 1)
    file = io.BytesIO()
    draw_contact_sheet(
        [cells[start : start + columns] for start in range(0, len(cells), columns)]
    ).save(file, "PNG", compress_level=4)
    return file.getvalue()
