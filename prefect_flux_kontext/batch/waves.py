"""The waves of a batch: blocks of rows, of which a few run at a time."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
from typing import TYPE_CHECKING, TypeAlias

from prefect_flux_kontext.batch.result_rows import line_from_outcome
from prefect_flux_kontext.batch.row import run_rows
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
"""Rows of a wave: few enough that little is lost with one wave, and enough that the number of task
runs stays small."""

_ROWS_PER_SLOT = 1.5
"""Rows in progress for each slot: some wait to be submitted, some are being stored."""


class Wave:
    """A block of rows and its number, from 1.

    This is not a dataclass, because Prefect would inspect its fields.
    """

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
        session.deferral.expect(rows)

    @property
    def batch(self) -> BatchSummary:
        """The summary of all rows of the batch so far."""
        return self._session.progress

    def _release_row(self) -> None:
        if self._open:  # a wave that is run again has released some of its rows already
            self._open -= 1
            self._room.release()

    def release_rows(self) -> None:
        """Release the room of rows that were never run."""
        while self._open:
            self._release_row()

    async def run(self) -> BatchSummary:
        """Record the wave in the ledger, run its rows, and record their outcomes.

        Raises:
            LedgerError: The ledger cannot be written to; none of the rows was run.
        """
        session = self._session
        ledger = session.ledger
        keys = {row.key for row in self._rows if isinstance(row, Row)}
        stored = await session.index.find_stored(keys, session.output)
        keys.difference_update(stored)
        if not keys:
            return await self._report(
                await run_rows(session, self._rows, stored, self._release_row)
            )
        wave = OpenWave(
            name=f"{ledger.owner}-{self.number:06}", owner=ledger.owner, keys=sorted(keys)
        )
        await open_wave(ledger.store, wave)
        done = await run_rows(session, self._rows, stored, self._release_row)
        entries = [session.latest.pop(key) for key in keys if key in session.latest]
        try:
            await close_wave(ledger.store, wave, entries)
        except LedgerError as error:
            # All rows have records of their own, so the only cost is to read these again.
            logger.warning("Wave %d stays unfinished in the ledger: %s", self.number, error)
        return await self._report(done)

    async def _report(self, done: list[DoneRow]) -> BatchSummary:
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
    """Run all rows in waves; start no further wave once the batch is stopped.

    Waves overlap, so that the account's slots never idle at the end of a wave: the next wave
    begins as soon as enough rows have ended, of whichever waves.

    Args:
        session: The batch's open resources.
        rows: The rows to run, read in another thread one wave at a time.
        run_wave: Runs one wave by calling its `run`, for example in a task run.
        concurrent_tasks: The account's limit of tasks that run at a time.
        first: Number of the first wave.

    Raises:
        LedgerError: The ledger cannot be reached.
        ManifestError: The rows cannot be read to their end.
    """
    loop = asyncio.get_running_loop()
    began = loop.time()
    summary = BatchSummary(output=str(session.output))
    room = asyncio.Semaphore(math.ceil(_ROWS_PER_SLOT * concurrent_tasks) + 2 * WAVE_ROWS)
    ledger_errors: list[LedgerError] = []

    async def run(wave: Wave) -> None:
        try:
            summary.add(await run_wave(wave))
        except LedgerError as error:
            # The other waves go on, to store what they have paid for.
            session.submitter.stop(error)
            ledger_errors.append(error)
        finally:
            wave.release_rows()

    source = iter(rows)
    try:
        async with asyncio.TaskGroup() as group:
            for number in itertools.count(first):
                for _ in range(WAVE_ROWS):
                    await room.acquire()
                block = await asyncio.to_thread(lambda: list(itertools.islice(source, WAVE_ROWS)))
                if not block or session.submitter.stopped:
                    session.deferral.mark_all_read()
                    break
                group.create_task(run(Wave(session, number, block, room)))
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    if ledger_errors:
        raise ledger_errors[0]
    summary.spent = session.submitter.spent
    summary.spent_by = session.submitter.spending.list_groups()
    summary.seconds = loop.time() - began
    return summary
