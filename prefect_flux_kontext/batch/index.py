"""Indexes of a ledger's rows by row key, in temporary databases instead of in memory."""

from __future__ import annotations

import asyncio
import json
import threading
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

from prefect_flux_kontext.batch.collection import read_unfinished_entries
from prefect_flux_kontext.batch.spending import Spending
from prefect_flux_kontext.ledger.head import check_format
from prefect_flux_kontext.ledger.heartbeat import is_alive
from prefect_flux_kontext.ledger.records import State
from prefect_flux_kontext.ledger.waves import FinishedRow, read_finished_rows
from prefect_flux_kontext.references.location import non_public_references
from prefect_flux_kontext.storage.temp_db import TempDatabase

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from prefect_flux_kontext.batch.policy import RowOptions
    from prefect_flux_kontext.ledger.records import Entry
    from prefect_flux_kontext.ledger.store import RecordStore
    from prefect_flux_kontext.storage.filesystem import OutputFolder

_INSERT_BLOCK_ROWS = 1_000
"""Rows inserted at a time: few enough to hold little in memory."""


class PlannedAction(StrEnum):
    """What a run will do about a row; the values are shown to users."""

    PAY = "to be paid"
    STORED = "stored already"
    OUTSTANDING = "paid, result outstanding"
    UNKNOWN = "unknown: may have been billed, not submitted again"
    FAILED = "failed before, not retried"


class _IndexedRow(NamedTuple):
    key: str
    attempt: int
    action: PlannedAction
    served_action: PlannedAction
    dollars: float
    columns: str = ""


class LedgerIndex(TempDatabase):
    """The planned action of each row key, in a private database in a temporary file."""

    def __init__(self) -> None:
        super().__init__(
            "CREATE TABLE rows (key BLOB PRIMARY KEY, attempt INTEGER, action TEXT, "
            "served_action TEXT, dollars REAL, columns TEXT) WITHOUT ROWID"
        )
        self._empty = True

    def get_action(self, key: str, references: Iterable[str] = ()) -> PlannedAction:
        """Return what a run will do about a row; a row unknown to the ledger is to be paid.

        Args:
            key: The row key.
            references: Its reference images. A row with references that we sign or stage is
                retried for more fail codes (`FailurePolicy.serve_again`).
        """
        if self._empty:
            return PlannedAction.PAY
        found = self._database.execute(
            "SELECT action, served_action FROM rows WHERE key = ?", (bytes.fromhex(key),)
        ).fetchone()
        if not found:
            return PlannedAction.PAY
        return PlannedAction(found[any(non_public_references(references))])

    def sum_dollars(self) -> float:
        """Sum the price of everything that was or may have been accepted, over all runs."""
        (total,) = self._database.execute("SELECT total(dollars) FROM rows").fetchone()
        return float(total)

    def sum_by(self, names: Iterable[str]) -> Spending:
        """Sum the same by the values of columns, as recorded with the payments."""
        spending = Spending(names)
        found = self._database.execute(
            "SELECT columns, count(*), total(dollars) FROM rows WHERE dollars > 0 GROUP BY columns"
        )
        for columns, rows, dollars in found:
            spending.add(json.loads(columns or "{}"), dollars, rows=rows)
        return spending

    async def read(self, store: RecordStore, options: RowOptions) -> None:
        """Read a ledger; of several attempts of a row, the latest counts.

        Raises:
            LedgerError: The ledger cannot be read or is damaged.
        """
        await check_format(store)
        # Unfinished waves first: a wave that ends meanwhile is then read twice rather than never.
        entries = await read_unfinished_entries(store)
        block = [await _index_entry(store, entry, options) for entry in entries]
        async for row in read_finished_rows(store):
            failed = row.ended.state == "failed"
            actions = (
                _plan_failed_row(options, row.ended.reason, row.failures)
                if failed
                else (PlannedAction.STORED, PlannedAction.STORED)
            )
            dollars, columns = row.spent + row.doubtful, _encode_columns(row.columns)
            block.append(_IndexedRow(row.key, row.attempt, *actions, dollars, columns))
            if len(block) >= _INSERT_BLOCK_ROWS:
                await asyncio.to_thread(self._add, block)
                block = []
        await asyncio.to_thread(self._add, block)

    def _add(self, block: list[_IndexedRow]) -> None:
        self._empty = self._empty and not block
        self._database.executemany(
            "INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET attempt = "
            "excluded.attempt, action = excluded.action, served_action = excluded.served_action, "
            "dollars = excluded.dollars, columns = excluded.columns "
            "WHERE excluded.attempt >= attempt",
            [(bytes.fromhex(row.key), *row[1:]) for row in block],
        )


class StoredRows(TempDatabase):
    """The stored rows of a ledger, in a private database in a temporary file."""

    def __init__(self) -> None:
        super().__init__("CREATE TABLE rows (key BLOB PRIMARY KEY, record TEXT) WITHOUT ROWID")
        self._lock = threading.Lock()

    async def read(self, store: RecordStore) -> None:
        """Read the stored rows of a ledger's wave files.

        Failed rows are not read, because a later attempt may have changed their state.

        Raises:
            LedgerError: The ledger cannot be read or is damaged.
        """
        block = []
        async for row in read_finished_rows(store):
            if row.ended.state == "stored":
                block.append((bytes.fromhex(row.key), row.model_dump_json(exclude_none=True)))
            if len(block) >= _INSERT_BLOCK_ROWS:
                await asyncio.to_thread(self._add, block)
                block = []
        await asyncio.to_thread(self._add, block)

    async def find(self, keys: Collection[str], output: OutputFolder) -> dict[str, FinishedRow]:
        """Return those of the rows that are stored, by row key.

        Rows whose images were removed from the output are left out, to be fetched again.
        """
        return await asyncio.to_thread(self._find, keys, output)

    def _add(self, block: list[tuple[bytes, str]]) -> None:
        self._database.executemany("INSERT OR REPLACE INTO rows VALUES (?, ?)", block)

    def _find(self, keys: Collection[str], output: OutputFolder) -> dict[str, FinishedRow]:
        found = {}
        with self._lock:
            for key in keys:
                [record] = self._database.execute(
                    "SELECT record FROM rows WHERE key = ?", (bytes.fromhex(key),)
                ).fetchone() or [None]
                if record is not None:
                    row = FinishedRow.model_validate_json(record)
                    if not output.find_missing(row.ended.files):
                        found[key] = row
        return found


async def _index_entry(store: RecordStore, entry: Entry, options: RowOptions) -> _IndexedRow:
    dollars, columns = entry.spent + entry.doubtful, _encode_columns(entry.columns)
    match entry.state:
        case State.INTENT if entry.intent is not None:
            if await is_alive(store, entry.intent.owner):
                action = PlannedAction.OUTSTANDING
            else:
                again = options.resubmit_unknown
                action = PlannedAction.PAY if again else PlannedAction.UNKNOWN
        case State.STORED:
            action = PlannedAction.STORED
        case State.FAILED:
            reason = entry.ended.reason if entry.ended else None
            actions = _plan_failed_row(options, reason, entry.failures)
            return _IndexedRow(entry.key, entry.attempt, *actions, dollars, columns)
        case State.ACCEPTED:
            action = PlannedAction.OUTSTANDING
        case _:
            action = PlannedAction.PAY
    return _IndexedRow(entry.key, entry.attempt, action, action, dollars, columns)


def _encode_columns(columns: dict[str, str] | None) -> str:
    return json.dumps(columns, sort_keys=True) if columns else ""


def _plan_failed_row(
    options: RowOptions, reason: str | None, failures: int
) -> tuple[PlannedAction, PlannedAction]:
    """Return the action for a row with public references only, and for one with others."""
    decisions = [
        options.policy.decide(reason, failures, asked_to_retry=options.retry_failed, served=served)
        for served in (False, True)
    ]
    public, served = (
        PlannedAction.PAY if decision == "retry" else PlannedAction.FAILED
        for decision in decisions
    )
    return public, served
