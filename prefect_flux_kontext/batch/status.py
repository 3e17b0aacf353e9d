"""The status of a ledger: states and costs of all rows."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prefect_flux_kontext.batch.index import LedgerIndex
from prefect_flux_kontext.batch.spending import STANDARD_COLUMNS, Spending, clean_value
from prefect_flux_kontext.errors import ConfigurationError
from prefect_flux_kontext.ledger.ledger import is_submitting
from prefect_flux_kontext.ledger.records import Entry, State
from prefect_flux_kontext.ledger.store import LEDGER_FOLDER
from prefect_flux_kontext.report.results import get_manifest_value, read_all_lines

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Sequence

    from prefect_flux_kontext.ledger.store import RecordStore
    from prefect_flux_kontext.storage.filesystem import OutputFolder


@dataclass
class LedgerStatus:
    """The states and costs of an output's rows. Money is in dollars.

    Unknown submits, also those given up, may have cost the doubtful sum in addition. Outstanding
    rows are the oldest first; the run of unknown rows is dead. The images of `missing` stored rows
    were removed; None if not looked for.
    """

    states: Counter[State]
    spent: float
    doubtful: float
    outstanding: list[Entry] = field(default_factory=list)
    unknown: list[Entry] = field(default_factory=list)
    missing: int | None = None
    spending: Spending = field(default_factory=Spending)


async def read_ledger_status(
    store: RecordStore,
    output: OutputFolder | None = None,
    by: Sequence[str] = (),
    *,
    verify: bool = False,
) -> LedgerStatus:
    """Read the states and costs of all rows.

    With an output, it looks for images that were removed; on an object store only with `verify`,
    because this lists it. Money is counted by columns with the values that were recorded with the
    payments, else those of the result manifest.

    Raises:
        ConfigurationError: No row has one of the columns.
        LedgerError: The ledger cannot be read or is damaged.
        StorageError: The output cannot be listed.
    """
    with LedgerIndex() as index:
        entries = await index.read(store)
        status = LedgerStatus(index.count_states(), *index.sum_money())
        for entry in entries:
            if entry.state is State.ACCEPTED:
                status.outstanding.append(entry)
            elif (
                entry.state is State.INTENT
                and entry.intent is not None
                and not await is_submitting(store, entry.intent)
            ):
                status.unknown.append(entry)
        status.outstanding.sort(key=lambda entry: entry.task.submitted_at)
        if output is not None and (output.is_local or verify):
            listed = None if output.is_local else await output.list_all(leave_out=LEDGER_FOLDER)
            status.missing = await asyncio.to_thread(index.count_missing, output, listed)
        if by and output is not None:
            status.spending = await _count_spending(index, output, by)
    return status


async def _count_spending(
    index: LedgerIndex, output: OutputFolder, names: Sequence[str]
) -> Spending:
    """Count the money of all rows by columns."""
    spending = Spending(names)
    found = await _read_columns(output, names)
    seen: set[str] = set()
    for key, spent, doubtful, recorded in index.list_money():
        columns = found.get(key, {}) | recorded
        seen.update(columns)
        if spent or doubtful:
            spending.add(columns, spent, doubtful)
    if unknown := sorted(set(names) - seen - STANDARD_COLUMNS):
        raise ConfigurationError(
            f"No row of {output} has a value in {', '.join(unknown)}. The columns are those of "
            "its manifests."
        )
    return spending


async def _read_columns(output: OutputFolder, names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return the values of rows in columns, by row key; of equal rows, those of the first."""
    found: dict[str, dict[str, str]] = {}
    async for line in read_all_lines(output):
        if line.get("key") not in found and line.get("key"):
            found[line["key"]] = {
                name: clean_value(value)
                for name in names
                if (value := get_manifest_value(line, name)) is not None
            }
    return found
