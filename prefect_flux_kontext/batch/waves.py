"""A batch as waves: rows in blocks, a few blocks under way at a time."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
from typing import TYPE_CHECKING, TypeAlias

from prefect_flux_kontext.batch.result_rows import line_from_outcome
from prefect_flux_kontext.batch.summary import BatchSummary
from prefect_flux_kontext.errors import LedgerError
from prefect_flux_kontext.ledger.waves import OpenWave, close_wave, open_wave
from prefect_flux_kontext.manifest.row import Row

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from prefect_flux_kontext.batch.session import Session
    from prefect_flux_kontext.batch.summary import DoneRow
    from prefect_flux_kontext.manifest.row import RefusedRow

logger = logging.getLogger(__name__)

RunWave: TypeAlias = "Callable[[Wave], Awaitable[BatchSummary]]"

WAVE_ROWS = 250
"""Rows of a wave: few enough to lose little with one, enough that 100 rows are no task run."""

_ROWS_A_SLOT = 1.5
"""Rows under way for each task that may run: some wait to be submitted, some are being stored."""


class Wave:
    """A block of rows and its number, from 1. No dataclass: Prefect would look into it."""

    def __init__(
        self,
        session: Session,
        number: int,
        rows: list[Row | RefusedRow],
        room: asyncio.Semaphore,
    ) -> None:
        self.number = number
        self._session = session
        self._rows = rows
        self._room = room
        self._open = len(rows)
        session.rows.deferral.expect(rows)

    @property
    def batch(self) -> BatchSummary:
        """What became of all rows of the batch so far."""
        return self._session.rows.progress

    def _row_ended(self) -> None:
        if self._open:  # a wave that is run again has given back some of its room already
            self._open -= 1
            self._room.release()

    def give_back(self) -> None:
        """Make room for as many rows as were never run."""
        while self._open:
            self._row_ended()

    async def run(self) -> BatchSummary:
        """Run the rows between naming them in the ledger and writing what came of them.

        Raises:
            LedgerError: The ledger cannot be written to; none of the rows was run.
        """
        ledger, runner = self._session.ledger, self._session.rows
        keys = {row.key for row in self._rows if isinstance(row, Row)}
        stored = await self._session.stored.of(keys)
        keys.difference_update(stored)
        if not keys:
            return await self._told(await runner.run(self._rows, stored, self._row_ended))
        wave = OpenWave(
            name=f"{ledger.owner}-{self.number:06}", owner=ledger.owner, keys=sorted(keys)
        )
        await open_wave(ledger.store, wave)
        done = await runner.run(self._rows, stored, self._row_ended)
        entries = [runner.latest.pop(key) for key in keys if key in runner.latest]
        try:
            await close_wave(ledger.store, wave, entries)
        except LedgerError as error:
            # Its rows are all on record. Named as unfinished, they are read again, that is all.
            logger.warning("Wave %d stays unfinished in the ledger: %s", self.number, error)
        return await self._told(done)

    async def _told(self, done: list[DoneRow]) -> BatchSummary:
        summary = BatchSummary()
        for row in done:
            summary.count(row.outcome)
        session = self._session
        lines = (line_from_outcome(session, row) for row in done)
        await session.report.add(self.number, lines)
        return summary


async def run_waves(
    session: Session,
    rows: Iterable[Row | RefusedRow],
    run_wave: RunWave,
    *,
    concurrent_tasks: int,
    first: int = 1,
) -> BatchSummary:
    """Run all rows, reading them as it goes; no further wave once the batch is stopped.

    Waves overlap, so that the account's slots never idle at a wave's tail: another begins as soon
    as enough rows have ended, whichever waves they are of.

    Args:
        session: What the batch has open.
        rows: What is to be done; read in another thread, a wave at a time.
        run_wave: Runs one wave, by its `run`; the place to make it a task run.
        concurrent_tasks: The account's limit of tasks running at once.
        first: Number of the first wave.

    Raises:
        LedgerError: The ledger cannot be reached.
        ManifestError: The rows cannot be read to their end.
    """
    loop = asyncio.get_running_loop()
    began = loop.time()
    summary = BatchSummary(output=str(session.output))
    room = asyncio.Semaphore(math.ceil(_ROWS_A_SLOT * concurrent_tasks) + 2 * WAVE_ROWS)
    broken: list[LedgerError] = []

    async def run(wave: Wave) -> None:
        try:
            summary.add(await run_wave(wave))
        except LedgerError as error:
            # What the other waves have paid for is still to be stored.
            session.submitter.stop(error)
            broken.append(error)
        finally:
            wave.give_back()

    source = iter(rows)
    try:
        async with asyncio.TaskGroup() as group:
            for number in itertools.count(first):
                for _ in range(WAVE_ROWS):
                    await room.acquire()
                block = await asyncio.to_thread(lambda: list(itertools.islice(source, WAVE_ROWS)))
                if not block or session.submitter.stopped:
                    session.rows.deferral.all_read()
                    break
                group.create_task(run(Wave(session, number, block, room)))
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    if broken:
        raise broken[0]
    summary.spent = session.submitter.spent
    summary.seconds = loop.time() - began
    return summary
