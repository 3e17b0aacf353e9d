"""A whole batch: its waves, the outstanding rows of earlier runs, and the file of failed rows."""

from __future__ import annotations

import csv
import io
import json
import logging
import re
from typing import TYPE_CHECKING

from prefect_flux_kontext.batch.collection import collect_outstanding
from prefect_flux_kontext.batch.planning import with_row_keys
from prefect_flux_kontext.batch.waves import run_waves
from prefect_flux_kontext.errors import (
    BatchStoppedError,
    BudgetReachedError,
    ManifestError,
)
from prefect_flux_kontext.ledger.store import open_ledger_store
from prefect_flux_kontext.manifest.reader import Manifest
from prefect_flux_kontext.manifest.row import find_reference_problems, list_references
from prefect_flux_kontext.references.location import non_public_references
from prefect_flux_kontext.references.rights import find_retry_rights

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from prefect_flux_kontext.batch.session import Session
    from prefect_flux_kontext.batch.summary import BatchSummary, RowOutcome
    from prefect_flux_kontext.batch.waves import RunWave
    from prefect_flux_kontext.manifest.row import RefusedRow, Row
    from prefect_flux_kontext.storage.filesystem import OutputFolder

logger = logging.getLogger(__name__)

FAILED_ROWS = "failed.csv"
"""The manifest of failed rows, below the output."""

_FAILED_REFERENCES = "failed.json"
"""The references that the failed rows may name, in the ledger: a list of paths and bucket URLs."""

_FORMULA = re.compile(r"^[=+\-@\t\r]")

_FAILURE_COLUMNS = ("failed_reason", "failed_message")


async def run_batch(
    session: Session,
    rows: Iterable[Row | RefusedRow],
    run_wave: RunWave,
    *,
    concurrent_tasks: int,
) -> BatchSummary:
    """Run all rows, collect the outstanding rows of earlier runs, and write the failed rows.

    Args:
        session: The batch's open resources.
        rows: The rows to run.
        run_wave: Runs one wave by calling its `run`, for example in a task run.
        concurrent_tasks: The account's limit of tasks that run at a time.

    Raises:
        BatchStoppedError: Further rows would fail too (refused key, no balance, nearly all rows
            failed). Rows submitted before are stored, or outstanding in the ledger.
        BudgetReachedError: The next row would exceed the budget.
        LedgerError: The ledger cannot be reached.
        ManifestError: The rows cannot be read to their end.
    """
    rows = with_row_keys(rows, session.rows.options.references)
    summary = await run_waves(session, rows, run_wave, concurrent_tasks=concurrent_tasks)
    if session.submitter.stopped is None:
        # A stopped run keeps the old file, because its rows may be the ones that were to be run.
        await _write_failed_rows(session)
    if session.submitter.stopped is None and not session.rows.options.deferred:
        left = await collect_outstanding(session, run_wave, concurrent_tasks=concurrent_tasks)
        if left.rows:
            logger.info("Collected rows of earlier runs: %s.", left)
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
    """Run the rows of one partition; the coordinator writes the batch's reports.

    Args:
        session: The partition's open resources.
        rows: The partition's rows.
        run_wave: Runs one wave by calling its `run`, for example in a task run.
        concurrent_tasks: The partition's share of the account's limit.

    Raises:
        BatchStoppedError: As `run_batch`, except at the budget: a partition may end when its
            share is spent.
        LedgerError: The ledger cannot be reached.
    """
    keyed_rows = with_row_keys(rows, session.rows.options.references)
    summary = await run_waves(session, keyed_rows, run_wave, concurrent_tasks=concurrent_tasks)
    stopped = session.submitter.stopped
    if stopped is not None and not isinstance(stopped, BudgetReachedError):
        raise BatchStoppedError(f"{stopped} Until then: {summary}.")
    return summary


async def read_failed_manifest(
    output: OutputFolder, prompt: str | None, styles: str | Sequence[str] | None
) -> Manifest:
    """Read the failed rows of the last run as a manifest.

    They may name the references that the ledger records for them. Apart from these they have the
    rights of a remote manifest, because others may be able to write to the output.

    Args:
        output: The output of the batch.
        prompt: The prompt for rows without one.
        styles: The styles of the batch.

    Raises:
        LedgerError: The ledger cannot be read.
        ManifestError: There are no failed rows.
        StorageError: The file cannot be read.
    """
    data = await output.read(FAILED_ROWS)
    if not data:
        raise ManifestError(f"There are no failed rows in {output.uri(FAILED_ROWS)}.")
    text = io.StringIO(data.decode(errors="surrogateescape"), newline="")
    rows = list(csv.DictReader(text, strict=True))
    recorded = await open_ledger_store(output).read(_FAILED_REFERENCES)
    rights = find_retry_rights(str(output), json.loads(recorded or b"[]"))
    return Manifest(rows, prompt, styles=styles, rights=rights)


def format_failed_rows(failed: Sequence[tuple[Mapping[str, str], RowOutcome]]) -> bytes:
    """Format failed rows as a CSV file: their cells as they are, the reason and the message."""
    columns = list(dict.fromkeys(name for cells, _ in failed for name in cells))
    columns = [name for name in columns if name not in _FAILURE_COLUMNS]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([*columns, *_FAILURE_COLUMNS])
    for cells, outcome in failed:
        row = [cells.get(name, "") for name in columns]
        texts = (outcome.reason or "", outcome.message or "")
        # The service may have written them, and spreadsheets run formulas.
        writer.writerow([*row, *(_FORMULA.sub(r"'\g<0>", text) for text in texts)])
    return text.getvalue().encode(errors="surrogateescape")


async def _write_failed_rows(session: Session) -> None:
    """Write the failed rows as a manifest that can be run again unchanged."""
    failed = session.rows.failed
    if not failed:
        if await session.output.read(FAILED_ROWS):
            await session.output.discard(FAILED_ROWS)
        return
    references = {
        image
        for cells, _ in failed
        for image in list_references(cells)
        if not find_reference_problems(image)
    }
    allowed = json.dumps(non_public_references(sorted(references))).encode()
    await session.ledger.store.replace(_FAILED_REFERENCES, allowed)
    await session.output.write(FAILED_ROWS, format_failed_rows(failed), is_private=True)
    logger.info(
        "%d failed %s in %s. To run them again: flux-kontext retry-failed %s",
        len(failed),
        "row is" if len(failed) == 1 else "rows are",
        session.output.uri(FAILED_ROWS),
        session.output,
    )
