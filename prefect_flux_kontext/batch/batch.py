"""A whole batch: its waves, what earlier runs have left behind, and the failed rows."""

from __future__ import annotations

import asyncio
import csv
import io
import logging
from datetime import timedelta
from typing import TYPE_CHECKING

from prefect_flux_kontext.batch.references import keyed
from prefect_flux_kontext.batch.result_lines import ended_line, row_of
from prefect_flux_kontext.batch.summary import RowOutcome
from prefect_flux_kontext.batch.waves import run_waves
from prefect_flux_kontext.errors import (
    BatchStoppedError,
    BudgetReachedError,
    LedgerError,
    ManifestError,
    StorageError,
)
from prefect_flux_kontext.ledger.checkpoints import (
    OpenWave,
    close_wave,
    forget_wave,
    open_wave,
    open_waves,
)
from prefect_flux_kontext.ledger.owners import is_alive
from prefect_flux_kontext.ledger.states import OWED, State
from prefect_flux_kontext.models import utc_now

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from prefect_flux_kontext.batch.session import Session
    from prefect_flux_kontext.batch.summary import BatchSummary
    from prefect_flux_kontext.batch.waves import RunWave
    from prefect_flux_kontext.ledger.ledger import Ledger
    from prefect_flux_kontext.ledger.records import Entry
    from prefect_flux_kontext.manifest.rows import RefusedRow, Row
    from prefect_flux_kontext.storage import OutputFolder

logger = logging.getLogger(__name__)

FAILED_ROWS = "failed.csv"
_WHY = ("failed_reason", "failed_message")
_WARN_BEFORE = timedelta(days=3)
_TOLD = 20
_COLLECTING_FROM = 500_001
"""Numbers of the waves that collect, apart from those of the manifest's waves."""


async def run_batch(
    session: Session,
    rows: Iterable[Row | RefusedRow],
    run_wave: RunWave,
    *,
    concurrent_tasks: int,
) -> BatchSummary:
    """Run all rows, collect what earlier runs have left, and write the failed rows down.

    Raises:
        BatchStoppedError: There is no point in submitting further rows (key, balance, nearly
            all fail). What was submitted before is stored, or on record to be collected.
        LedgerError: The ledger cannot be reached.
    """
    rows = keyed(rows, session.rows.options.references)
    summary = await run_waves(session, rows, run_wave, concurrent_tasks=concurrent_tasks)
    if session.submitter.stopped is None:
        # Else the failed rows stay as they are: they may be what was to be run.
        await _write_failed(session)
    if session.submitter.stopped is None and not session.rows.options.deferred:
        left = await collect(session, run_wave, concurrent_tasks=concurrent_tasks)
        if left.rows:
            logger.info("Of rows that earlier runs left: %s.", left)
    if session.submitter.stopped is not None:
        kind = BatchStoppedError
        if isinstance(session.submitter.stopped, BudgetReachedError):
            kind = BudgetReachedError
        raise kind(f"{session.submitter.stopped} Until then: {summary}.")
    return summary


async def run_part(
    session: Session,
    rows: Iterable[Row],
    run_wave: RunWave,
    *,
    concurrent_tasks: int,
) -> BatchSummary:
    """Run some of a batch's rows, and leave all that is told of the whole to whoever has all.

    Raises:
        BatchStoppedError: As for a batch, but for the budget: a part may end at its share.
        LedgerError: The ledger cannot be reached.
    """
    keyed_rows = keyed(rows, session.rows.options.references)
    summary = await run_waves(session, keyed_rows, run_wave, concurrent_tasks=concurrent_tasks)
    stopped = session.submitter.stopped
    if stopped is not None and not isinstance(stopped, BudgetReachedError):
        raise BatchStoppedError(f"{stopped} Until then: {summary}.")
    return summary


async def collect(session: Session, run_wave: RunWave, *, concurrent_tasks: int) -> BatchSummary:
    """Wait for, download and store what ended runs have paid for; pays for nothing.

    Raises:
        LedgerError: The ledger cannot be reached.
    """
    session.rows.submits = False
    ledger = session.ledger
    others = [wave async for wave in open_waves(ledger.store) if wave.owner != ledger.owner]
    abandoned = [wave for wave in others if await _is_left(ledger, wave)]
    entries, unreadable = await _read(ledger, {key for wave in abandoned for key in wave.keys})
    owed = [entry for entry in entries if entry.state in OWED]
    # The oldest first: its result is the next to expire.
    owed.sort(key=lambda entry: entry.intent.at if entry.intent else utc_now())
    _warn_of_expiry(owed, session.rows.options.result_days)
    rows = [row_of(entry) for entry in owed]
    summary = await run_waves(
        session, rows, run_wave, concurrent_tasks=concurrent_tasks, first=_COLLECTING_FROM
    )
    # Of what had ended, its run may have died before the result manifest said so.
    lines = [ended_line(session, entry) for entry in entries if entry.ended is not None]
    if lines:
        await session.report.add(_COLLECTING_FROM - 1, lines)
    for key, error in unreadable.items():
        summary.count(
            RowOutcome(id=key, line=0, state="failed", reason=error.reason, message=error.message)
        )
    if abandoned and session.submitter.stopped is None:
        # What they owed is in waves of our own by now, what cannot be read stays in theirs.
        ended = [entry for entry in entries if entry.state not in OWED]
        ours = OpenWave(name=f"{ledger.owner}-ended", owner=ledger.owner, keys=[])
        await close_wave(ledger.store, ours, ended)
        for wave in abandoned:
            if keys := [key for key in wave.keys if key in unreadable]:
                await open_wave(ledger.store, wave.model_copy(update={"keys": keys}))
            else:
                await forget_wave(ledger.store, wave)
        if others == abandoned:  # else a living run may still wait to be told of such rows
            made_by = {entry.intent.owner for entry in owed if entry.intent is not None}
            await session.rows.called.clear(made_by | {wave.owner for wave in abandoned})
    return summary


async def _is_left(ledger: Ledger, wave: OpenWave) -> bool:
    """Whether the wave's run is gone; one that cannot be told may live."""
    try:
        return not await is_alive(ledger.store, wave.owner)
    except LedgerError as error:
        logger.warning("Rows of an earlier run are left alone: %s", error)
        return False


async def _read(
    ledger: Ledger, keys: Iterable[str]
) -> tuple[Sequence[Entry], dict[str, LedgerError]]:
    """Where rows stand, and what is wrong with the records of the others."""
    unreadable: dict[str, LedgerError] = {}

    async def read(key: str) -> Entry | None:
        try:
            return await ledger.read(key)
        except LedgerError as error:
            unreadable[key] = error
            return None

    read_all = await asyncio.gather(*map(read, sorted(keys)))
    return [entry for entry in read_all if entry is not None], unreadable


def _warn_of_expiry(owed: Sequence[Entry], result_days: float) -> None:
    soon = expiring(owed, result_days)
    for entry, left in soon[:_TOLD]:
        logger.warning(
            "Row %s (task %s) is paid for and its result expires in %.1f days.",
            entry.key,
            entry.task.task_id,
            left.total_seconds() / 86_400,
        )
    if len(soon) > _TOLD:
        logger.warning("So do the results of %d more rows.", len(soon) - _TOLD)


def expiring(owed: Sequence[Entry], result_days: float) -> list[tuple[Entry, timedelta]]:
    """The rows whose results are gone in three days or less, and how long each still lives."""
    ends = timedelta(days=result_days)
    left = [
        (entry, entry.task.submitted_at + ends - utc_now())
        for entry in owed
        if entry.state is State.ACCEPTED
    ]
    return [(entry, lives) for entry, lives in left if lives < _WARN_BEFORE]


async def failed_rows(output: OutputFolder) -> list[dict[str, str]]:
    """The failed rows of the last run, as a manifest of their own.

    Raises:
        ManifestError: There are none.
        StorageError: They cannot be read.
    """
    data = await output.read(FAILED_ROWS)
    if not data:
        raise ManifestError(f"There are no failed rows: none are in {output.uri(FAILED_ROWS)}.")
    text = io.StringIO(data.decode(errors="surrogateescape"), newline="")
    return list(csv.DictReader(text, strict=True))


async def _forget_failed(output: OutputFolder) -> None:
    if await output.read(FAILED_ROWS):
        try:
            await output.remove(FAILED_ROWS)
        except StorageError:  # nothing may be removed there
            await output.write(FAILED_ROWS, b"")


async def _write_failed(session: Session) -> None:
    """Write the failed rows as a manifest that can be run again as it is."""
    failed = session.rows.unstored
    if not failed:
        await _forget_failed(session.output)
        return
    columns = list(dict.fromkeys(name for cells, _ in failed for name in cells))
    columns = [name for name in columns if name not in _WHY]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([*columns, *_WHY])
    for cells, outcome in failed:
        row = [cells.get(name, "") for name in columns]
        writer.writerow([*row, outcome.reason or "", outcome.message or ""])
    await session.output.write(FAILED_ROWS, text.getvalue().encode(errors="surrogateescape"))
    logger.info(
        "%d failed rows are in %s; to run them again: flux-kontext retry-failed %s",
        len(failed),
        session.output.uri(FAILED_ROWS),
        session.output,
    )
