"""The index of what a ledger holds, by row key, in a temporary database instead of in memory."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter, defaultdict
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from prefect_flux_kontext.batch.collection import read_unfinished_entries
from prefect_flux_kontext.batch.spending import Spending
from prefect_flux_kontext.ledger.head import check_format
from prefect_flux_kontext.ledger.ledger import is_submitting
from prefect_flux_kontext.ledger.records import State
from prefect_flux_kontext.ledger.waves import (
    parse_indexed_rows,
    read_finished_waves,
    read_lines_of_wave,
)
from prefect_flux_kontext.references.location import non_public_references
from prefect_flux_kontext.storage.temp_db import TempDatabase

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    from prefect_flux_kontext.batch.policy import RowOptions
    from prefect_flux_kontext.ledger.records import Entry
    from prefect_flux_kontext.ledger.store import RecordStore
    from prefect_flux_kontext.ledger.waves import FinishedRow, IndexedRow
    from prefect_flux_kontext.manifest.row import Row
    from prefect_flux_kontext.storage.filesystem import OutputFolder

_SELECTED_ROWS = 250
"""Rows that one query finds."""


class PlannedAction(StrEnum):
    """What a run will do about a row; the values are shown to users."""

    PAY = "to be paid"
    STORED = "stored already"
    OUTSTANDING = "paid, result outstanding"
    UNKNOWN = "unknown: may have been billed, not submitted again"
    FAILED = "failed before, not retried"


_Values: TypeAlias = tuple[Any, ...]
"""The values of a row of the database."""


class StoredRow(NamedTuple):
    """What the index knows of a row that is stored in a finished wave."""

    files: list[str]
    flags: list[str]
    at: float
    """When it was stored, in seconds since 1970."""


class LedgerIndex(TempDatabase):
    """The state and cost of each row, in a private database in a temporary file.

    Of a stored row it has what `StoredRow` has and its place in the wave files.
    """

    def __init__(self) -> None:
        super().__init__(
            "CREATE TABLE rows (key BLOB PRIMARY KEY, attempt INTEGER, state TEXT, reason TEXT, "
            "failures INTEGER, spent REAL, doubtful REAL, columns TEXT, files TEXT, flags TEXT, "
            "at REAL, wave INTEGER, line INTEGER) WITHOUT ROWID"
        )
        self._empty = True
        self._lock = threading.Lock()
        self._waves: list[tuple[RecordStore, str]] = []

    async def read(self, store: RecordStore) -> list[Entry]:
        """Read a ledger; of several attempts of a row, the latest counts.

        Returns:
            The rows of unfinished waves.

        Raises:
            LedgerError: The ledger cannot be read or is damaged.
        """
        await check_format(store)
        # Unfinished waves first: a wave that ends meanwhile is then read twice rather than never.
        entries = await read_unfinished_entries(store)
        await asyncio.to_thread(self._add, [await _index_entry(store, entry) for entry in entries])
        await self.read_finished(store)
        return entries

    async def read_finished(self, store: RecordStore) -> None:
        """Read the rows of finished waves only.

        Raises:
            LedgerError: The ledger cannot be read or is damaged.
        """
        async for name, data in read_finished_waves(store):
            self._waves.append((store, name))
            await asyncio.to_thread(self._add_wave, parse_indexed_rows(store, name, data))

    def get_actions(self, rows: Sequence[Row], options: RowOptions) -> list[PlannedAction]:
        """Return what a run will do about rows; those unknown to the ledger are to be paid."""
        found = self._select("key, state, reason, failures", [row.key for row in rows])
        known = {key.hex(): decided for key, *decided in found}
        if not known:
            return [PlannedAction.PAY] * len(rows)
        return [
            _get_action(row, options, *known[row.key]) if row.key in known else PlannedAction.PAY
            for row in rows
        ]

    def count_states(self) -> Counter[State]:
        """Return how many rows have each state."""
        found = self._database.execute("SELECT state, count(*) FROM rows GROUP BY state")
        return Counter({State(state): rows for state, rows in found})

    def sum_money(self) -> tuple[float, float]:
        """Return the dollars of what was accepted in all runs, and of what may have been."""
        found = self._database.execute("SELECT total(spent), total(doubtful) FROM rows")
        spent, doubtful = found.fetchone()
        return spent, doubtful

    def sum_by(self, names: Iterable[str]) -> Spending:
        """Return the sum of both by the values of columns, as recorded with the payments."""
        spending = Spending(names)
        found = self._database.execute(
            "SELECT columns, count(*), total(spent + doubtful) AS dollars FROM rows "
            "GROUP BY columns HAVING dollars > 0"
        )
        for columns, rows, dollars in found:
            spending.add(json.loads(columns or "{}"), dollars, rows=rows)
        return spending

    def list_money(self) -> Iterator[tuple[str, float, float, dict[str, str]]]:
        """Yield key, accepted and doubtful dollars, and recorded columns of each row."""
        found = self._database.execute("SELECT key, spent, doubtful, columns FROM rows")
        for key, spent, doubtful, columns in found:
            yield key.hex(), spent, doubtful, json.loads(columns or "{}")

    def count_missing(self, output: OutputFolder, listed: Collection[str] | None) -> int:
        """Return how many stored rows lack an image; see `OutputFolder.find_missing`; blocking."""
        with self._lock:
            found = self._database.execute("SELECT files FROM rows WHERE files IS NOT NULL")
            return sum(bool(output.find_missing(files.split("\n"), listed)) for (files,) in found)

    def select_stored(self, keys: Iterable[str]) -> dict[str, StoredRow]:
        """Return those of the rows that are stored in finished waves, by row key; blocking."""
        with self._lock:
            found = self._select("key, files, flags, at", keys)
        return {
            key.hex(): StoredRow(files.split("\n"), json.loads(flags) if flags else [], at)
            for key, files, flags, at in found
            if files is not None
        }

    async def find_stored(
        self, keys: Collection[str], output: OutputFolder
    ) -> dict[str, FinishedRow]:
        """Return the records of those of the rows that are stored in finished waves, by row key.

        Rows whose images were removed from the output are left out, to be fetched again.

        Raises:
            LedgerError: A wave file cannot be read or is damaged.
        """
        lines = defaultdict(list)
        for wave, line in await asyncio.to_thread(self._find_lines, keys):
            lines[wave].append(line)
        rows = [
            row
            for wave, numbers in lines.items()
            for row in await read_lines_of_wave(*self._waves[wave], numbers)
        ]
        return await asyncio.to_thread(
            lambda: {
                row.key: row
                for row in rows
                if row.key in keys and not output.find_missing(row.ended.files)
            }
        )

    def _find_lines(self, keys: Iterable[str]) -> list[tuple[int, int]]:
        with self._lock:
            found = self._select("wave, line", keys)
        return [(wave, line) for wave, line in found if wave is not None]

    def _select(self, columns: str, keys: Iterable[str]) -> list[Any]:
        wanted = [bytes.fromhex(key) for key in keys] if not self._empty else []
        found = []
        for start in range(0, len(wanted), _SELECTED_ROWS):
            block = wanted[start : start + _SELECTED_ROWS]
            places = ", ".join("?" * len(block))
            query = f"SELECT {columns} FROM rows WHERE key IN ({places})"  # noqa: S608
            found += self._database.execute(query, block).fetchall()
        return found

    def _add_wave(self, rows: Iterable[IndexedRow]) -> None:
        wave = len(self._waves) - 1
        self._add([_index_finished_row(row, wave, line) for line, row in enumerate(rows)])

    def _add(self, block: list[_Values]) -> None:
        self._empty = self._empty and not block
        self._database.executemany(
            "INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) "
            "ON CONFLICT DO UPDATE SET attempt = excluded.attempt, state = excluded.state, "
            "reason = excluded.reason, failures = excluded.failures, "
            "spent = excluded.spent, doubtful = excluded.doubtful, "
            "columns = excluded.columns, files = excluded.files, flags = excluded.flags, "
            "at = excluded.at, wave = excluded.wave, line = excluded.line "
            "WHERE excluded.attempt >= attempt",
            block,
        )


async def _index_entry(store: RecordStore, entry: Entry) -> _Values:
    state = entry.state
    if state is State.INTENT and entry.intent is not None:
        state = State.INTENT if await is_submitting(store, entry.intent) else State.UNKNOWN
    return (
        bytes.fromhex(entry.key),
        entry.attempt,
        str(state),
        entry.ended.reason if entry.ended else None,
        entry.failures,
        entry.spent,
        entry.doubtful,
        _encode_columns(entry.columns),
        *(None, None, None, None, None),
    )


def _index_finished_row(row: IndexedRow, wave: int, line: int) -> _Values:
    ended = row["ended"]
    # Only for stored rows: a later attempt may have changed the state of a failed one.
    stored: _Values = (None, None, None, None, None)
    if ended["state"] == "stored":
        images = ended.get("images")
        flags = images[0].get("flags") if images else None
        files = "\n".join(ended.get("files", ()))
        stored = (files, json.dumps(flags) if flags else None, ended["at"].timestamp(), wave, line)
    return (
        bytes.fromhex(row["key"]),
        row["attempt"],
        ended["state"],
        ended.get("reason"),
        row["failures"],
        row["spent"],
        row.get("doubtful", 0.0),
        _encode_columns(row.get("columns")),
        *stored,
    )


def _get_action(
    row: Row, options: RowOptions, state: State, reason: str | None, failures: int
) -> PlannedAction:
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
                served=bool(non_public_references(row.request.image_urls)),
            )
            return PlannedAction.PAY if decision == "retry" else PlannedAction.FAILED
    return PlannedAction.PAY


def _encode_columns(columns: dict[str, str] | None) -> str:
    return json.dumps(columns, sort_keys=True) if columns else ""
