"""A whole batch: its waves, the outstanding rows of earlier runs, and the file of failed rows."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import io
import json
import logging
import re
from typing import TYPE_CHECKING, TypeAlias

from prefect_flux_kontext.batch.collection import collect_outstanding
from prefect_flux_kontext.batch.reference_checks import with_row_keys
from prefect_flux_kontext.batch.spending import REQUEST_COLUMNS
from prefect_flux_kontext.batch.stored import leave_out_stored
from prefect_flux_kontext.batch.summary import (
    BatchSummary,
    RowName,
    RowOutcome,
    get_row_name,
)
from prefect_flux_kontext.batch.waves import run_waves
from prefect_flux_kontext.errors import (
    BatchStoppedError,
    BudgetReachedError,
    LedgerError,
    ManifestError,
)
from prefect_flux_kontext.ledger.records import RECORD_VERSION, check_version
from prefect_flux_kontext.ledger.store import open_ledger_store
from prefect_flux_kontext.manifest.reader import Manifest
from prefect_flux_kontext.manifest.row import find_reference_problems, list_references
from prefect_flux_kontext.references.location import non_public_references
from prefect_flux_kontext.references.rights import find_retry_rights
from prefect_flux_kontext.report.results import RESULTS_JSONL

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from prefect_flux_kontext.batch.session import Session
    from prefect_flux_kontext.batch.waves import RunWave
    from prefect_flux_kontext.ledger.store import RecordStore
    from prefect_flux_kontext.manifest.row import RefusedRow, Row
    from prefect_flux_kontext.storage.filesystem import OutputFolder

logger = logging.getLogger(__name__)

FAILED_ROWS = "failed.csv"
"""The manifest of failed rows, below the output."""

_FAILED_REFERENCES = "failed.json"
"""The references that the failed rows may name, in the ledger."""

_FORMULA = re.compile(r"^[=+\-@\t\r]")

_FAILURE_COLUMNS = ("failed_line", "failed_reason", "failed_message")
"""Columns that the file adds to those of the rows: the line of the manifest, and the failure."""


_Failure: TypeAlias = "tuple[Mapping[str, str], RowOutcome]"
"""The cells of a row and its outcome."""


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
    earlier = await _read_failures(session.output)
    run_again = session.run_again
    keyed_rows = with_row_keys(rows, session.options.references)
    if earlier:
        keyed_rows = _find_rows(keyed_rows, set(map(_name, earlier)), run_again)
    summary = await _run_rows(session, keyed_rows, run_wave, concurrent_tasks)
    if session.submitter.stopped is not None:
        # A stopped run keeps all old failures, because they may be the rows that were to be run.
        run_again.clear()
    await _write_failed_rows(session, [row for row in earlier if _name(row) not in run_again])
    if session.submitter.stopped is None and not session.options.deferred:
        left = await run_collection(session, run_wave, concurrent_tasks=concurrent_tasks)
        if left.rows:
            logger.info("Collected rows of earlier runs: %s.", left)
    summary.balance_before, summary.balance_after = session.balance, None
    if session.balance is not None:
        summary.balance_after = await session.client.find_balance()
    session.progress.balance_before = summary.balance_before
    session.progress.balance_after = summary.balance_after
    if session.submitter.stopped is not None:
        kind = BatchStoppedError
        if isinstance(session.submitter.stopped, BudgetReachedError):
            kind = BudgetReachedError
        raise kind(f"{session.submitter.stopped} Until then: {summary}.")
    return summary


async def run_collection(
    session: Session, run_wave: RunWave, *, concurrent_tasks: int
) -> BatchSummary:
    """Collect the outstanding rows of earlier runs, and add those that failed to the failed rows.

    Raises:
        LedgerError: The ledger cannot be reached.
    """
    summary = await collect_outstanding(session, run_wave, concurrent_tasks=concurrent_tasks)
    if summary.failed:
        await _write_failed_rows(session, await _read_failures(session.output))
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
        concurrent_tasks: The account's limit of tasks at a time.

    Raises:
        BatchStoppedError: As `run_batch`, except at the budget: a partition may end when its
            share is spent.
        LedgerError: The ledger cannot be reached.
    """
    keyed_rows = with_row_keys(rows, session.options.references)
    summary = await _run_rows(session, keyed_rows, run_wave, concurrent_tasks)
    stopped = session.submitter.stopped
    if stopped is not None and not isinstance(stopped, BudgetReachedError):
        raise BatchStoppedError(f"{stopped} Until then: {summary}.")
    return summary


async def _run_rows(
    session: Session,
    rows: Iterable[Row | RefusedRow],
    run_wave: RunWave,
    concurrent_tasks: int,
) -> BatchSummary:
    """Count the rows that are stored already, and run the others."""
    await session.report.load_lines()
    counts = BatchSummary()
    rows_to_run = leave_out_stored(session, rows, counts, asyncio.get_running_loop())
    summary = await run_waves(session, rows_to_run, run_wave, concurrent_tasks=concurrent_tasks)
    return summary.add(counts)


async def read_failed_rows(output: OutputFolder) -> list[dict[str, str]]:
    """Read the failed rows of an output, over all its runs, as rows of a manifest.

    Raises:
        ManifestError: The file is not a CSV file, or no batch has run into the output.
        StorageError: The file cannot be read.
    """
    data = await output.read(FAILED_ROWS)
    if not data:
        if await output.exists(RESULTS_JSONL):
            return []
        raise ManifestError(
            f"There are no failed rows in {output.uri(FAILED_ROWS)}, and no results either: is "
            "the output right?"
        )
    text = io.StringIO(data.decode(errors="surrogateescape"), newline="")
    try:
        reader = csv.DictReader(text, restkey="", restval="", strict=True)
        # A row that was added by hand is on no line of a manifest but on one of this file.
        return [
            {**row, "failed_line": row.get("failed_line") or str(reader.line_num)}
            for row in reader
        ]
    except csv.Error as error:
        raise ManifestError(f"{output.uri(FAILED_ROWS)} is not a CSV file: {error}.") from None


async def read_failed_manifest(
    output: OutputFolder,
    prompt: str | None,
    styles: str | Sequence[str] | None,
    base_url: str | None = None,
) -> Manifest | None:
    """Read the failed rows of an output, over all its runs, as a manifest; None without any.

    They may name the references that the ledger records for them. Apart from these they have the
    rights of a remote manifest, because others may be able to write to the output.

    Args:
        output: The output of the batch.
        prompt: The prompt for rows without one.
        styles: The styles of the batch.
        base_url: The service, which must reach references on the web.

    Raises:
        LedgerError: The ledger cannot be read.
        ManifestError: The file is not a CSV file, or no batch has run into the output.
        StorageError: The file cannot be read.
    """
    rows = await read_failed_rows(output)
    if not rows:
        return None
    rights = find_retry_rights(str(output), await _read_allowed(open_ledger_store(output)))
    lines = [_take_failure(row)[0] for row in rows]
    return Manifest(
        rows,
        prompt,
        styles=styles,
        rights=rights,
        text_to_image=True,
        base_url=base_url,
        name=output.uri(FAILED_ROWS),
        lines=lines,
    )


def _take_failure(row: dict[str, str]) -> tuple[int, str | None, str | None]:
    """Remove from a row of the file its line in the manifest, and why it failed."""
    line, reason, message = (row.pop(name, "") for name in _FAILURE_COLUMNS)
    return _parse_line(line), reason or None, message or None


def _parse_line(text: str) -> int:
    try:
        return max(0, int(text))
    except ValueError:
        return 0


async def _read_allowed(store: RecordStore) -> list[str]:
    """Return the references that rows in the file of failed rows may name."""
    record = json.loads(await store.read(_FAILED_REFERENCES) or b"{}")
    check_version(record.get("version", RECORD_VERSION))
    allowed: list[str] = record.get("references", [])
    return allowed


def format_failed_rows(failed: Sequence[_Failure]) -> bytes:
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
        safe = (_FORMULA.sub(r"'\g<0>", text) for text in texts)
        writer.writerow([*row, outcome.line, *safe])
    return text.getvalue().encode(errors="surrogateescape")


async def _read_failures(output: OutputFolder) -> list[_Failure]:
    """Return the failed rows of earlier runs."""
    if not await output.read(FAILED_ROWS):
        return []
    failures: list[_Failure] = []
    for cells in await read_failed_rows(output):
        cells.pop("", None)
        line, reason, message = _take_failure(cells)
        outcome = RowOutcome(
            id=cells.get("id", ""),
            line=line,
            style=cells.get("style") or None,
            state="failed",
            reason=reason,
            message=message,
        )
        failures.append((cells, outcome))
    return failures


def _name(failure: _Failure) -> RowName:
    cells, outcome = failure
    return get_row_name(outcome.id, cells)


def _find_rows(
    rows: Iterable[Row | RefusedRow], wanted: set[RowName], found: set[RowName]
) -> Iterator[Row | RefusedRow]:
    """Yield the rows, and add the names of the wanted ones among them to `found`."""
    for row in rows:
        if (name := get_row_name(row.id, row.cells)) in wanted:
            found.add(name)
        yield row


async def _read_cells(session: Session, outcome: RowOutcome) -> dict[str, str]:
    """Return the cells of a collected row, which the ledger does not have, from its request."""
    cells = {"id": outcome.id}
    with contextlib.suppress(LedgerError):
        intent = (await session.ledger.read(outcome.key)).intent if outcome.key else None
        if intent is not None:
            request = intent.request
            cells |= {name: getattr(request, name) for name in REQUEST_COLUMNS}
            if request.image_urls:
                cells["images"] = json.dumps(request.image_urls)
            if intent.variant > 1:
                cells["variants"] = f"only {intent.variant}"
            if intent.name:
                cells["output"] = intent.name.removesuffix(f"~v{intent.variant}")
    return cells


async def _write_failed_rows(session: Session, earlier: Iterable[_Failure]) -> None:
    """Write the failed rows as a manifest that can be run again unchanged.

    Args:
        session: The batch, with the rows that failed in this run.
        earlier: Further rows, which failed in earlier runs.
    """
    own: list[_Failure] = [
        ({"id": outcome.id, **(cells or await _read_cells(session, outcome))}, outcome)
        for cells, outcome in session.failed
    ]
    names = set(map(_name, own))
    kept = [row for row in earlier if _name(row) not in names]
    if not own and not kept:
        if await session.output.read(FAILED_ROWS):
            await session.output.discard(FAILED_ROWS)
        return
    # Earlier rows are read from the output, where others may have changed them.
    allowed = set(await _read_allowed(session.ledger.store)) & _find_references(kept)
    allowed |= _find_references(own)
    record = {"version": RECORD_VERSION, "references": sorted(allowed)}
    await session.ledger.store.replace(_FAILED_REFERENCES, json.dumps(record).encode())
    failed = sorted([*kept, *own], key=lambda failure: failure[1].line)
    await session.output.write(FAILED_ROWS, format_failed_rows(failed), is_private=True)
    logger.info(
        "%d failed %s in %s. To run them again: flux-kontext retry-failed %s",
        len(failed),
        "row is" if len(failed) == 1 else "rows are",
        session.output.uri(FAILED_ROWS),
        session.output,
    )


def _find_references(failed: Iterable[_Failure]) -> set[str]:
    """Return the references of failed rows that are local or private."""
    images = (image for cells, _ in failed for image in list_references(cells))
    return set(non_public_references([i for i in images if not find_reference_problems(i)]))
