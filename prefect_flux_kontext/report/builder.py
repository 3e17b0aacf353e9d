"""The report of a run: result manifest, gallery and contact sheet.

A failure to write the report is logged. It never fails the batch.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from prefect_flux_kontext.errors import LedgerError
from prefect_flux_kontext.report.gallery.builder import GALLERY, build_gallery
from prefect_flux_kontext.report.gallery.thumbnails import ThumbnailStore
from prefect_flux_kontext.report.line_index import (
    HashSet,
    hash_verdicts,
    read_line_index,
    write_line_index,
)
from prefect_flux_kontext.report.results import (
    RESULTS_JSONL,
    LineMerger,
    acquire_merge_lock,
    list_mergeable_parts,
    load_digests,
    open_results_store,
    read_parts,
    remove_parts,
    write_parquet,
    write_part,
    write_run_plan,
)
from prefect_flux_kontext.report.thumbnails import ThumbnailCollector
from prefect_flux_kontext.report.verdicts import Verdicts

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from prefect_flux_kontext.client.transport import Connections
    from prefect_flux_kontext.ledger.store import RecordStore
    from prefect_flux_kontext.report.results import Line
    from prefect_flux_kontext.settings import FluxKontextSettings
    from prefect_flux_kontext.storage.filesystem import OutputFolder

logger = logging.getLogger(__name__)

RESULTS_PARQUET = "results.parquet"

# A thumbnail of a reference is worth a short wait at the end of a run, not a long one.
_REFERENCE_WAIT_SECONDS = 5.0

# Stored images without a thumbnail come from earlier runs. Each one is read back from the output,
# so the end of a run makes only this many; `flux-kontext gallery` makes the others.
_MAX_THUMBNAILS_AT_END = 500


class Report:
    """The report of one run, which is a live owner in the ledger.

    The run of a partition only makes thumbnails; that of the whole batch writes result manifest
    and gallery.
    """

    def __init__(
        self,
        output: OutputFolder,
        ledger: RecordStore,
        run: str,
        http: Connections,
        settings: FluxKontextSettings,
        *,
        is_whole: bool = True,
    ) -> None:
        self.pictures = ThumbnailCollector(
            http, settings.gallery_images, references=settings.gallery_references
        )
        self._output = output
        self._ledger = ledger
        self._run = run
        self._max_rows = settings.gallery_images
        self._thumbnails = ThumbnailStore(output)
        self._is_whole = is_whole
        self._has_changes = False
        self._has_known_rows = False
        self._known: HashSet | None = None

    async def load_lines(self) -> None:
        """Load what `has_line` needs of earlier runs' lines."""
        if self._is_whole and self._known is None:
            self._known = HashSet()
            try:
                self._known = await load_digests(self._output)
            except Exception as error:  # noqa: BLE001 - every row gets a line instead
                logger.warning("The results of earlier runs cannot be read: %s", error)

    def has_line(self, digest: int) -> bool:
        """Whether the results have a line with this digest; a partition writes none."""
        known = not self._is_whole or (self._known is not None and digest in self._known)
        self._has_known_rows = self._has_known_rows or known
        return known

    async def announce(self, rows: int) -> None:
        """Record the number of rows of the run, for those who watch it."""
        try:
            await write_run_plan(open_results_store(self._output), self._run, rows)
        except LedgerError as error:
            logger.warning("The progress of this run cannot be watched: %s", error)

    async def add(self, number: int, lines: Iterable[Line]) -> None:
        """Write the result lines of a wave."""
        try:
            self._has_changes = True
            if self._is_whole:
                await write_part(open_results_store(self._output), self._run, number, lines)
            await self._save_thumbnails(f"{number:06}")
        except Exception as error:  # noqa: BLE001 - the images are worth more than the report
            logger.warning("Wave %d is not in the report: %s", number, error)

    async def finish(self) -> None:
        """Update result manifest and gallery, if a wave was added or lines were left behind."""
        try:
            if self._has_changes or self._has_known_rows:
                has_changes, self._has_changes = self._has_changes, False
                self._has_known_rows = False
                await self.pictures.wait(_REFERENCE_WAIT_SECONDS)
                await self._save_thumbnails("last")
                if self._is_whole:
                    await update_report(
                        self._output,
                        self._ledger,
                        self._run,
                        self._thumbnails,
                        max_rows=self._max_rows,
                        max_new_thumbnails=_MAX_THUMBNAILS_AT_END,
                        only_changes=not has_changes,
                    )
        except Exception as error:  # noqa: BLE001 - the images are worth more than the report
            logger.warning(
                "The report is not up to date: %s. To rebuild it: flux-kontext gallery %s",
                str(error).rstrip("."),
                self._output,
            )

    async def _save_thumbnails(self, name: str) -> None:
        if thumbnails := self.pictures.take():
            await self._thumbnails.add(f"{self._run}-{name}", thumbnails)


@asynccontextmanager
async def open_report(report: Report) -> AsyncIterator[None]:
    """Finish the report after the block. If the block is cancelled, the next run finishes it."""
    try:
        try:
            yield
        except Exception:
            await report.finish()
            raise
        await report.finish()
    finally:
        report.pictures.close()


async def update_report(
    output: OutputFolder,
    ledger: RecordStore,
    run: str,
    thumbnails: ThumbnailStore,
    *,
    max_rows: int,
    max_new_thumbnails: int,
    only_changes: bool = False,
) -> int:
    """Merge the lines of ended runs into the result manifest, then rebuild the gallery.

    Returns the number of rows in the result manifest. With `max_rows` of 0 no gallery is written.
    With `only_changes`, nothing is written if there are no new lines and no new verdicts.
    Raises LedgerError or StorageError if the output cannot be read or written.
    """
    store = open_results_store(output)
    with tempfile.TemporaryDirectory(prefix="flux-kontext-") as folder, LineMerger() as merger:
        earlier, merged, kept, parquet = (
            Path(folder, name) for name in ("earlier", "merged", "kept", "parquet")
        )
        async with acquire_merge_lock(store, ledger, run):
            parts = await list_mergeable_parts(store, ledger, run)
            verdicts = {
                key: str(found.verdict) for key, found in (await Verdicts(output).load()).items()
            }
            known = await read_line_index(output, await output.read_stamp(RESULTS_JSONL))
            if (
                only_changes
                and known is not None
                and not parts
                and known.verdicts == hash_verdicts(verdicts)
                and (not max_rows or await output.exists(GALLERY))
            ):
                return len(known)
            await output.fetch(RESULTS_JSONL, earlier)
            async for data in read_parts(store, parts):
                await asyncio.to_thread(merger.add, data)
            rows = await asyncio.to_thread(merger.write, earlier, merged, verdicts, known)
            has_changes = bool(parts) or merger.has_new_verdicts
            if has_changes:
                await output.put(RESULTS_JSONL, merged)
                if merger.kept[0]:
                    await output.fetch(RESULTS_PARQUET, kept)
                columns = merger.index.columns
                if await asyncio.to_thread(
                    write_parquet, merged, parquet, columns, kept, merger.kept
                ):
                    await output.put(RESULTS_PARQUET, parquet)
                else:
                    # The file of an earlier run would contradict results.jsonl.
                    await output.discard(RESULTS_PARQUET)
            await remove_parts(store, parts)
            index = merger.index
            if max_rows and rows:
                index.statistics = await build_gallery(
                    output,
                    merged,
                    thumbnails,
                    max_rows=max_rows,
                    max_new_thumbnails=max_new_thumbnails,
                    statistics=index.statistics,
                )
            if rows and (has_changes or index is not known):
                await write_line_index(output, index, await output.read_stamp(RESULTS_JSONL))
    return rows
