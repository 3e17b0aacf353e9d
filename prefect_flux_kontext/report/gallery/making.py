"""The gallery and the contact sheet of an output, from its result manifest and pictures."""

from __future__ import annotations

import asyncio
import base64
import io
import logging
import secrets
from typing import TYPE_CHECKING

from prefect_flux_kontext.report.contact_sheet import contact_sheet
from prefect_flux_kontext.report.gallery.album import ALBUM_FOLDER
from prefect_flux_kontext.report.gallery.page import shown, write_page
from prefect_flux_kontext.report.merging import read_lines
from prefect_flux_kontext.report.numbers import Numbers
from prefect_flux_kontext.report.pictures import name_of_image, name_of_reference
from prefect_flux_kontext.report.thumbnails import AFTER, thumbnail

if TYPE_CHECKING:
    from pathlib import Path

    from prefect_flux_kontext.report.columns import Line
    from prefect_flux_kontext.report.gallery.album import Album
    from prefect_flux_kontext.storage import OutputFolder

logger = logging.getLogger(__name__)

GALLERY = "gallery.html"
CONTACT_SHEET = f"{ALBUM_FOLDER}/contact-sheet.png"
"""In a folder of its own, where no row's image can be."""

_HELD_BY_THE_PAGE = 150
_ON_THE_SHEET = 48
_SHEET_COLUMNS = 6
_AT_ONCE = 8


async def make_gallery(
    output: OutputFolder, results: Path, album: Album, *, most: int, missing: int
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
    numbers = Numbers()
    rows = await asyncio.to_thread(_first, results, numbers, most)
    await album.read()
    await _make_missing(output, rows, album, missing)
    after = [_after(row) for row in rows]
    before = [_before(row) for row in rows]
    there = [name for name in after if name in album.places]
    small = len(rows) <= _HELD_BY_THE_PAGE
    held = [*after, *before] if small else there[:_ON_THE_SHEET]
    pictures = await album.pictures(name for name in held if name)
    page = await asyncio.to_thread(
        write_page,
        rows,
        title=str(output).rstrip("/").rpartition("/")[2],
        folder=ALBUM_FOLDER,
        numbers=numbers.told(),
        after=after,
        before=before,
        places={} if small else album.places,
        pictures=pictures if small else {},
    )
    await output.write(GALLERY, page.encode())
    if there:
        sheet = await asyncio.to_thread(_sheet, rows, after, pictures)
        await output.write(CONTACT_SHEET, sheet)


def _first(results: Path, numbers: Numbers, most: int) -> list[Line]:
    """The first rows, and the numbers of all."""
    rows: list[Line] = []
    for line in numbers.counting(read_lines(results)):
        if len(rows) < most:
            rows.append(shown(line))
    return rows


def _after(row: Line) -> str | None:
    return name_of_image(row["key"]) if row["state"] == "stored" else None


def _before(row: Line) -> str | None:
    references = row.get("references")
    return name_of_reference(references[0]) if references else None


async def _make_missing(output: OutputFolder, rows: list[Line], album: Album, most: int) -> None:
    wanted = {
        name: row["file"]
        for row in rows
        if (name := _after(row)) and name not in album.places and row.get("file")
    }
    made: dict[str, bytes] = {}

    async def make(name: str, file: str) -> None:
        try:
            if (image := await output.read(file)) is not None:
                made[name] = await asyncio.to_thread(thumbnail, image, AFTER)
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


def _sheet(rows: list[Line], after: list[str | None], pictures: dict[str, str]) -> bytes:
    cells = [
        (row["id"], io.BytesIO(base64.b64decode(pictures[name].partition(",")[2])))
        for row, name in zip(rows, after, strict=True)
        if name in pictures
    ][:_ON_THE_SHEET]
    columns = min(_SHEET_COLUMNS, len(cells))
    file = io.BytesIO()
    contact_sheet(
        [cells[start : start + columns] for start in range(0, len(cells), columns)]
    ).save(file, "PNG", compress_level=4)
    return file.getvalue()
