"""The gallery and the contact sheet of an output, from its result manifest and pictures."""

from __future__ import annotations

import asyncio
import base64
import io
import logging
import secrets
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from prefect_flux_kontext.report.gallery.contact_sheet import contact_sheet
from prefect_flux_kontext.report.gallery.page import GalleryRows, render_page
from prefect_flux_kontext.report.gallery.thumbnails import ALBUM_FOLDER
from prefect_flux_kontext.report.results import read_lines
from prefect_flux_kontext.report.statistics import Statistics
from prefect_flux_kontext.report.thumbnails import AFTER, make_thumbnail

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prefect_flux_kontext.report.gallery.thumbnails import ThumbnailStore
    from prefect_flux_kontext.storage.filesystem import OutputFolder

logger = logging.getLogger(__name__)

GALLERY = "gallery.html"
CONTACT_SHEET = f"{ALBUM_FOLDER}/contact-sheet.png"
"""In a folder of its own, where no row's image can be."""

_HELD_BY_THE_PAGE = 150
_ON_THE_SHEET = 48
_SHEET_COLUMNS = 6
_AT_ONCE = 8


async def build_gallery(
    output: OutputFolder, results: Path, album: ThumbnailStore, *, most: int, missing: int
) -> None:
    """Write gallery and contact sheet.

    Args:
        output: The batch's output.
        results: Its result manifest, on this machine.
        album: The gallery's pictures.
        most: Rows that the page shows.
        missing: Pictures that may be made from images in the output.

    Raises:
        LedgerError: The pictures cannot be read or written.
        StorageError: The output refused.
    """
    numbers = Statistics()
    rows = await asyncio.to_thread(_first, results, numbers, most)
    await album.read()
    await _make_missing(output, rows, album, missing)
    there = [name for name in rows.after if name in album.places]
    small = len(rows) <= _HELD_BY_THE_PAGE
    named = [name for name in (*rows.after, *rows.before) if name in album.places]
    pictures = await album.pictures(named if small else there[:_ON_THE_SHEET])
    pieces = render_page(
        rows,
        title=str(output).rstrip("/").rpartition("/")[2],
        folder=ALBUM_FOLDER,
        numbers=numbers.told(),
        places={} if small else {name: album.places[name] for name in named},
        pictures=pictures if small else {},
    )
    with tempfile.TemporaryDirectory(prefix="flux-kontext-") as private:
        file = Path(private, "page")
        await asyncio.to_thread(_write, pieces, file)
        await output.put(GALLERY, file)
    if there:
        sheet = await asyncio.to_thread(_sheet, rows, pictures)
        await output.write(CONTACT_SHEET, sheet)


def _first(results: Path, numbers: Statistics, most: int) -> GalleryRows:
    """The first rows, and the numbers of all."""
    rows = GalleryRows()
    for line in numbers.counting(read_lines(results)):
        if len(rows) < most:
            rows.add(line)
    return rows


def _write(pieces: Iterable[str], file: Path) -> None:
    with file.open("w", encoding="utf-8") as page_file:
        page_file.writelines(pieces)


async def _make_missing(
    output: OutputFolder, rows: GalleryRows, album: ThumbnailStore, most: int
) -> None:
    wanted = {
        name: file
        for name, file in zip(rows.after, rows.columns["file"], strict=True)
        if name and file and name not in album.places
    }
    made: dict[str, bytes] = {}

    async def make(name: str, file: str) -> None:
        try:
            if (image := await output.read(file)) is not None:
                made[name] = await asyncio.to_thread(make_thumbnail, image, AFTER)
        except Exception as error:  # noqa: BLE001 - decoders raise whatever they stumble on
            logger.warning("No picture of %s for the gallery: %s", file, error)

    chosen = list(wanted.items())[:most]
    for start in range(0, len(chosen), _AT_ONCE):
        await asyncio.gather(*(make(*item) for item in chosen[start : start + _AT_ONCE]))
    if made:
        await album.add(f"made-{secrets.token_hex(6)}", made)
        await album.read()
    if len(wanted) > most:
        logger.warning(
            "%d images have no picture in the gallery yet. To make them: flux-kontext gallery %s",
            len(wanted) - most,
            output,
        )


def _sheet(rows: GalleryRows, pictures: dict[str, str]) -> bytes:
    cells = [
        (of, io.BytesIO(base64.b64decode(pictures[name].partition(",")[2])))
        for of, name in zip(rows.columns["id"], rows.after, strict=True)
        if name in pictures
    ][:_ON_THE_SHEET]
    columns = min(_SHEET_COLUMNS, len(cells))
    file = io.BytesIO()
    contact_sheet(
        [cells[start : start + columns] for start in range(0, len(cells), columns)]
    ).save(file, "PNG", compress_level=4)
    return file.getvalue()
