"""A whole batch: its waves, what earlier runs have left behind, and the failed rows."""

from __future__ import annotations

import csv
import io
import logging
from typing import TYPE_CHECKING

from prefect_flux_kontext.batch.collection import collect_outstanding
from prefect_flux_kontext.batch.planning import with_row_keys
from prefect_flux_kontext.batch.waves import run_waves
from prefect_flux_kontext.errors import (
    BatchStoppedError,
    BudgetReachedError,
    ManifestError,
    StorageError,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prefect_flux_kontext.batch.session import Session
    from prefect_flux_kontext.batch.summary import BatchSummary
    from prefect_flux_kontext.batch.waves import RunWave
    from prefect_flux_kontext.manifest.row import RefusedRow, Row
    from prefect_flux_kontext.storage.filesystem import OutputFolder

logger = logging.getLogger(__name__)

FAILED_ROWS = "failed.csv"
_WHY = ("failed_reason", "failed_message")


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
    rows = with_row_keys(rows, session.rows.options.references)
    summary = await run_waves(session, rows, run_wave, concurrent_tasks=concurrent_tasks)
    if session.submitter.stopped is None:
        # Else the failed rows stay as they are: they may be what was to be run.
        await _write_failed(session)
    if session.submitter.stopped is None and not session.rows.options.deferred:
        left = await collect_outstanding(session, run_wave, concurrent_tasks=concurrent_tasks)
        if left.rows:
            logger.info("Of rows that earlier runs left: %s.", left)
    if session.submitter.stopped is not None:
        kind = BatchStoppedError
        if isinstance(session.submitter.stopped, BudgetReachedError):
            kind = BudgetReachedError
        raise kind(f"{session.submitter.stopped} Until then: {summary}.")
    return summary


async def run_partition_rows(
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
    keyed_rows = with_row_keys(rows, session.rows.options.references)
    summary = await run_waves(session, keyed_rows, run_wave, concurrent_tasks=concurrent_tasks)
    stopped = session.submitter.stopped
    if stopped is not None and not isinstance(stopped, BudgetReachedError):
        raise BatchStoppedError(f"{stopped} Until then: {summary}.")
    return summary


async def read_failed_rows(output: OutputFolder) -> list[dict[str, str]]:
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
