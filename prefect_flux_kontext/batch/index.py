"""The index of what a ledger holds, by row key, in a temporary database instead of in memory."""

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
    key: bytes
    attempt: int
    state: State
    reason: str | None
    failures: int
    dollars: float
    columns: str
    record: str | None


class LedgerIndex(TempDatabase):
    """The state and cost of each row, in a private database in a temporary file."""

    def __init__(self) -> None:
        super().__init__(
            "CREATE TABLE rows (key BLOB PRIMARY KEY, attempt INTEGER, state TEXT, reason TEXT, "
            "failures INTEGER, dollars REAL, columns TEXT, record TEXT) WITHOUT ROWID"
        )
        self._empty = True
        self._lock = threading.Lock()

    async def read(self, store: RecordStore) -> None:
        """Read a ledger; of several attempts of a row, the latest counts.

        Raises:
            LedgerError: The ledger cannot be read or is damaged.
        """
        await check_format(store)
        # Unfinished waves first: a wave that ends meanwhile is then read twice rather than never.
        entries = await read_unfinished_entries(store)
        await asyncio.to_thread(self._add, [await _index_entry(store, entry) for entry in entries])
        await self.read_finished(store)

    async def read_finished(self, store: RecordStore, *, keep_records: bool = False) -> None:
        """Read the rows of finished waves only.

        Args:
            store: The ledger's records.
            keep_records: Whether `find_stored` is going to be used.

        Raises:
            LedgerError: The ledger cannot be read or is damaged.
        """
        block = []
        async for row in read_finished_rows(store):
            block.append(_index_finished_row(row, keep_record=keep_records))
            if len(block) >= _INSERT_BLOCK_ROWS:
                await asyncio.to_thread(self._add, block)
                block = []
        await asyncio.to_thread(self._add, block)

    def get_action(
        self, key: str, options: RowOptions, references: Iterable[str] = ()
    ) -> PlannedAction:
        """Return what a run will do about a row; a row unknown to the ledger is to be paid.

        Args:
            key: The row key.
            options: The options of the run.
            references: Its reference images. A row with references that we sign or stage is
                retried for more fail codes (`FailurePolicy.serve_again`).
        """
        if self._empty:
            return PlannedAction.PAY
        state, reason, failures = self._database.execute(
            "SELECT state, reason, failures FROM rows WHERE key = ?", (bytes.fromhex(key),)
        ).fetchone() or (State.PLANNED, None, 0)
        match state:
            case State.STORED:
                return PlannedAction.STORED
            case State.INTENT | State.ACCEPTED:
                return PlannedAction.OUTSTANDING
            case State.UNKNOWN if not options.resubmit_unknown:
                return PlannedAction.UNKNOWN
            case State.FAILED:
                decision = options.policy.decide(
                    reason,
                    failures,
                    asked_to_retry=options.retry_failed,
                    served=bool(non_public_references(references)),
                )
                return PlannedAction.PAY if decision == "retry" else PlannedAction.FAILED
        return PlannedAction.PAY

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

    async def find_stored(
        self, keys: Collection[str], output: OutputFolder
    ) -> dict[str, FinishedRow]:
        """Return those of the rows that are stored in finished waves, by row key.

        Rows whose images were removed from the output are left out, to be fetched again.
        """
        return await asyncio.to_thread(self._find_stored, keys, output)

    def _find_stored(self, keys: Collection[str], output: OutputFolder) -> dict[str, FinishedRow]:
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

    def _add(self, block: list[_IndexedRow]) -> None:
        self._empty = self._empty and not block
        self._database.executemany(
            "INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET "
            "attempt = excluded.attempt, state = excluded.state, reason = excluded.reason, "
            "failures = excluded.failures, dollars = excluded.dollars, "
            "columns = excluded.columns, record = excluded.record "
            "WHERE excluded.attempt >= attempt",
            block,
        )


async def _index_entry(store: RecordStore, entry: Entry) -> _IndexedRow:
    state = entry.state
    if state is State.INTENT and entry.intent is not None:
        state = State.INTENT if await is_alive(store, entry.intent.owner) else State.UNKNOWN
    return _IndexedRow(
        bytes.fromhex(entry.key),
        entry.attempt,
        state,
        entry.ended.reason if entry.ended else None,
        entry.failures,
        entry.spent + entry.doubtful,
        _encode_columns(entry.columns),
        None,
    )


def _index_finished_row(row: FinishedRow, *, keep_record: bool) -> _IndexedRow:
    state = State(row.ended.state)
    return _IndexedRow(
        bytes.fromhex(row.key),
        row.attempt,
        state,
        row.ended.reason,
        row.failures,
        row.spent + row.doubtful,
        _encode_columns(row.columns),
        # Only for stored rows: a later attempt may have changed the state of a failed one.
        row.model_dump_json(exclude_none=True) if keep_record and state is State.STORED else None,
    )


def _encode_columns(columns: dict[str, str] | None) -> str:
    return json.dumps(columns, sort_keys=True) if columns else ""
