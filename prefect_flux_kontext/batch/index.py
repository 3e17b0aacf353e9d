"""Where every row of a ledger stands, for as many as there are, with little held in memory."""

from __future__ import annotations

import asyncio
import threading
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

from prefect_flux_kontext.batch.collection import unfinished_entries
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


_BLOCK = 1_000


class PlannedAction(StrEnum):
    """What a run will do about a row."""

    PAY = "to be paid"
    STORED = "stored already"
    OUTSTANDING_STATES = "paid for already, to be collected"
    UNKNOWN = "unknown: maybe paid for, not submitted again"
    LEFT = "failed before, not paid for again"


class _Known(NamedTuple):
    key: str
    attempt: int
    standing: PlannedAction
    served: PlannedAction
    dollars: float


class LedgerIndex(TempDatabase):
    """What the ledger says of each row key, in a private database in a temporary file."""

    def __init__(self) -> None:
        super().__init__(
            "CREATE TABLE rows (key BLOB PRIMARY KEY, attempt INTEGER, standing TEXT, "
            "served TEXT, dollars REAL) WITHOUT ROWID"
        )
        self._empty = True

    def of(self, key: str, references: Iterable[str] = ()) -> PlannedAction:
        """Where a row stands; one that the ledger does not know is to be paid.

        Args:
            key: The row key.
            references: Its reference images; those that we serve get a second chance.
        """
        if self._empty:
            return PlannedAction.PAY
        found = self._database.execute(
            "SELECT standing, served FROM rows WHERE key = ?", (bytes.fromhex(key),)
        ).fetchone()
        return (
            PlannedAction(found[any(non_public_references(references))])
            if found
            else PlannedAction.PAY
        )

    def dollars(self) -> float:
        """Dollars for everything that was accepted or may have been, of whatever run."""
        (total,) = self._database.execute("SELECT total(dollars) FROM rows").fetchone()
        return float(total)

    async def read(self, store: RecordStore, options: RowOptions) -> None:
        """Read a ledger, in which a later attempt of a row may stand beside an earlier one.

        Raises:
            LedgerError: The ledger cannot be read or is damaged.
        """
        # Unfinished waves first: one that ends meanwhile is then in both rather than in neither.
        entries = await unfinished_entries(store)
        known = [await _of_entry(store, entry, options) for entry in entries]
        async for row in read_finished_rows(store):
            failed = row.ended.state == "failed"
            stand = (
                _after_failure(options, row.ended.reason, row.failures)
                if failed
                else (PlannedAction.STORED, PlannedAction.STORED)
            )
            known.append(_Known(row.key, row.attempt, *stand, row.spent + row.doubtful))
            if len(known) >= _BLOCK:
                await asyncio.to_thread(self._add, known)
                known = []
        await asyncio.to_thread(self._add, known)

    def _add(self, known: list[_Known]) -> None:
        self._empty = self._empty and not known
        self._database.executemany(
            "INSERT INTO rows VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET attempt = "
            "excluded.attempt, standing = excluded.standing, served = excluded.served, "
            "dollars = excluded.dollars "
            "WHERE excluded.attempt >= attempt",
            [(bytes.fromhex(row.key), *row[1:]) for row in known],
        )


async def _of_entry(store: RecordStore, entry: Entry, options: RowOptions) -> _Known:
    dollars = entry.spent + entry.doubtful
    match entry.state:
        case State.INTENT if entry.intent is not None:
            dollars += entry.intent.price
            if await is_alive(store, entry.intent.owner):
                standing = PlannedAction.OUTSTANDING_STATES
            else:
                again = options.resubmit_unknown
                standing = PlannedAction.PAY if again else PlannedAction.UNKNOWN
        case State.STORED:
            standing = PlannedAction.STORED
        case State.FAILED:
            reason = entry.ended.reason if entry.ended else None
            stand = _after_failure(options, reason, entry.failures)
            return _Known(entry.key, entry.attempt, *stand, dollars)
        case State.ACCEPTED:
            standing = PlannedAction.OUTSTANDING_STATES
        case _:
            standing = PlannedAction.PAY
    return _Known(entry.key, entry.attempt, standing, standing, dollars)


def _after_failure(
    options: RowOptions, reason: str | None, failures: int
) -> tuple[PlannedAction, PlannedAction]:
    decisions = [
        options.policy.decide(reason, failures, asked_to_retry=options.retry_failed, served=served)
        for served in (False, True)
    ]
    plain, served = (
        PlannedAction.PAY if told == "retry" else PlannedAction.LEFT for told in decisions
    )
    return plain, served


class StoredRows(TempDatabase):
    """The stored rows of a ledger, in a private database in a temporary file."""

    def __init__(self) -> None:
        super().__init__("CREATE TABLE rows (key BLOB PRIMARY KEY, record TEXT) WITHOUT ROWID")
        self._one_at_a_time = threading.Lock()

    async def read(self, store: RecordStore) -> None:
        """Read a ledger's parts.

        A failed row may have gone on in a later attempt, so only what is stored is taken as read.

        Raises:
            LedgerError: The ledger cannot be read or is damaged.
        """
        block = []
        async for row in read_finished_rows(store):
            if row.ended.state == "stored":
                block.append((bytes.fromhex(row.key), row.model_dump_json(exclude_none=True)))
            if len(block) >= _BLOCK:
                await asyncio.to_thread(self._add, block)
                block = []
        await asyncio.to_thread(self._add, block)

    async def of(self, keys: Collection[str]) -> dict[str, FinishedRow]:
        """Those of the rows that are stored, by row key."""
        return await asyncio.to_thread(self._find, keys)

    def _add(self, block: list[tuple[bytes, str]]) -> None:
        self._database.executemany("INSERT OR REPLACE INTO rows VALUES (?, ?)", block)

    def _find(self, keys: Collection[str]) -> dict[str, FinishedRow]:
        found = {}
        with self._one_at_a_time:
            for key in keys:
                [record] = self._database.execute(
                    "SELECT record FROM rows WHERE key = ?", (bytes.fromhex(key),)
                ).fetchone() or [None]
                if record is not None:
                    found[key] = FinishedRow.model_validate_json(record)
        return found
