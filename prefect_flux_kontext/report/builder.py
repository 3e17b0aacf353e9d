"""What a run leaves for people and their tools: result manifest, gallery, contact sheet.

Whatever goes wrong here is logged and costs the report, never the batch.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from prefect_flux_kontext.report.gallery.builder import build_gallery
from prefect_flux_kontext.report.gallery.thumbnails import ThumbnailStore
from prefect_flux_kontext.report.results import (
    NewLines,
    merge_lock,
    read_ended_parts,
    read_parts,
    remove_parts,
    results_store,
    write_parquet,
    write_part,
)
from prefect_flux_kontext.report.thumbnails import ThumbnailCollector

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from prefect_flux_kontext.client.transport import Connections
    from prefect_flux_kontext.ledger.store import RecordStore
    from prefect_flux_kontext.report.results import Line
    from prefect_flux_kontext.settings import FluxKontextSettings
    from prefect_flux_kontext.storage.filesystem import OutputFolder

logger = logging.getLogger(__name__)

RESULTS = "results.jsonl"
RESULTS_AS_PARQUET = "results.parquet"
_FOR_REFERENCES = 5.0
_MADE_AT_THE_END = 500
"""Pictures made at the end of a run from images that a run before has stored without one."""


class Report:
    """The report of one run.

    Args:
        output: The batch's output.
        ledger: The records of its ledger.
        run: The name of the run, which is a living owner there.
        http: For references.
        settings: How much the gallery shows.
        whole: Whether the run has the whole batch. One that has a part of it only makes pictures,
            and who has the whole writes result manifest and gallery.

    Attributes:
        pictures: Makes the gallery's pictures.
    """

    def __init__(
        self,
        output: OutputFolder,
        ledger: RecordStore,
        run: str,
        http: Connections,
        settings: FluxKontextSettings,
        *,
        whole: bool = True,
    ) -> None:
        self.pictures = ThumbnailCollector(
            http, settings.gallery_images, references=settings.gallery_references
        )
        self._output = output
        self._ledger = ledger
        self._run = run
        self._most = settings.gallery_images
        self._album = ThumbnailStore(output)
        self._whole = whole
        self._added = False

    async def add(self, number: int, lines: Iterable[Line]) -> None:
        """Write down what became of the rows of a wave."""
        try:
            self._added = True
            if self._whole:
                await write_part(results_store(self._output), self._run, number, lines)
            await self._keep_pictures(f"{number:06}")
        except Exception as error:  # noqa: BLE001 - the images are worth more than the report
            logger.warning("Wave %d is not in the report: %s", number, error)

    async def finish(self) -> None:
        """Bring result manifest and gallery up to date, if there is anything new."""
        try:
            if self._added:
                self._added = False
                await self.pictures.wait(_FOR_REFERENCES)
                await self._keep_pictures("last")
                if self._whole:
                    await bring_up_to_date(
                        self._output,
                        self._ledger,
                        self._run,
                        self._album,
                        most=self._most,
                        missing=_MADE_AT_THE_END,
                    )
        except Exception as error:  # noqa: BLE001 - the images are worth more than the report
            logger.warning("The report is not up to date: %s", error)

    async def _keep_pictures(self, name: str) -> None:
        if made := self.pictures.take():
            await self._album.add(f"{self._run}-{name}", made)


@asynccontextmanager
async def open_report(report: Report) -> AsyncIterator[None]:
    """Finish the report after the block, unless it was cancelled: then the next run does."""
    try:
        try:
            yield
        except Exception:
            await report.finish()
            raise
        await report.finish()
    finally:
        report.pictures.close()


async def bring_up_to_date(
    output: OutputFolder,
    ledger: RecordStore,
    run: str,
    album: ThumbnailStore,
    *,
    most: int,
    missing: int,
) -> int:
    """Merge what has ended into the result manifest, and make gallery and contact sheet of it.

    Args:
        output: The batch's output.
        ledger: The records of its ledger.
        run: The name of this run, which is a living owner there.
        album: The gallery's pictures.
        most: Rows that the gallery shows; 0 makes none.
        missing: Pictures that may be made from images in the output.

    Returns:
        How many rows the result manifest has.

    Raises:
        LedgerError: The output cannot be read or written.
        StorageError: Likewise.
    """
    store = results_store(output)
    with tempfile.TemporaryDirectory(prefix="flux-kontext-") as folder, NewLines() as new:
        earlier, merged, parquet = (Path(folder, name) for name in ("earlier", "now", "parquet"))
        async with merge_lock(store, ledger, run):
            await output.fetch(RESULTS, earlier)
            parts = await read_ended_parts(store, ledger, run)
            async for data in read_parts(store, parts):
                await asyncio.to_thread(new.add, data)
            rows = await asyncio.to_thread(new.write, earlier, merged)
            if parts:
                await output.put(RESULTS, merged)
                if await asyncio.to_thread(write_parquet, merged, parquet, new.own):
                    await output.put(RESULTS_AS_PARQUET, parquet)
                else:
                    # One of an earlier run would say what is no longer so.
                    await output.remove(RESULTS_AS_PARQUET)
                await remove_parts(store, parts)
            if most and rows:
                await build_gallery(output, merged, album, most=most, missing=missing)
    return rows
