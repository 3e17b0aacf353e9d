"""Collecting what ended runs have paid for, and leaving results to be collected."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

from prefect_flux_kontext.batch.result_rows import line_from_entry, row_from_entry
from prefect_flux_kontext.batch.summary import RowOutcome
from prefect_flux_kontext.batch.waves import run_waves
from prefect_flux_kontext.errors import (
    FluxKontextError,
    LedgerError,
)
from prefect_flux_kontext.ledger.heartbeat import is_alive
from prefect_flux_kontext.ledger.ledger import Ledger
from prefect_flux_kontext.ledger.records import OUTSTANDING_STATES, State
from prefect_flux_kontext.ledger.waves import (
    OpenWave,
    close_wave,
    delete_wave,
    open_wave,
    read_finished_rows,
    read_open_waves,
)
from prefect_flux_kontext.models import utc_now

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from prefect_flux_kontext.manifest.row import RefusedRow, Row
if TYPE_CHECKING:
    from prefect_flux_kontext.ledger.records import Entry
    from prefect_flux_kontext.ledger.store import RecordStore
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from prefect_flux_kontext.batch.session import Session
    from prefect_flux_kontext.batch.summary import BatchSummary
    from prefect_flux_kontext.batch.waves import RunWave
    from prefect_flux_kontext.ledger.records import Entry
    from prefect_flux_kontext.manifest.row import RefusedRow, Row


logger = logging.getLogger(__name__)

_WARN_BEFORE = timedelta(days=3)


_TOLD = 20


_COLLECTING_FROM = 500_001
"""Numbers of the waves that collect, apart from those of the manifest's waves."""


async def collect_outstanding(
    session: Session, run_wave: RunWave, *, concurrent_tasks: int
) -> BatchSummary:
    """Wait for, download and store what ended runs have paid for; pays for nothing.

    Raises:
        LedgerError: The ledger cannot be reached.
    """
    session.rows.submits = False
    ledger = session.ledger
    others = [wave async for wave in read_open_waves(ledger.store) if wave.owner != ledger.owner]
    abandoned = [wave for wave in others if await _is_left(ledger, wave)]
    entries, unreadable = await _read(ledger, {key for wave in abandoned for key in wave.keys})
    owed = [entry for entry in entries if entry.state in OUTSTANDING_STATES]
    # The oldest first: its result is the next to expire.
    owed.sort(key=lambda entry: entry.intent.at if entry.intent else utc_now())
    _warn_of_expiry(owed, session.rows.options.result_days)
    rows = [row_from_entry(entry) for entry in owed]
    summary = await run_waves(
        session, rows, run_wave, concurrent_tasks=concurrent_tasks, first=_COLLECTING_FROM
    )
    # Of what had ended, its run may have died before the result manifest said so.
    lines = [line_from_entry(session, entry) for entry in entries if entry.ended is not None]
    if lines:
        await session.report.add(_COLLECTING_FROM - 1, lines)
    for key, error in unreadable.items():
        summary.count(
            RowOutcome(id=key, line=0, state="failed", reason=error.reason, message=error.message)
        )
    if abandoned and session.submitter.stopped is None:
        # What they owed is in waves of our own by now, what cannot be read stays in theirs.
        ended = [entry for entry in entries if entry.state not in OUTSTANDING_STATES]
        ours = OpenWave(name=f"{ledger.owner}-ended", owner=ledger.owner, keys=[])
        await close_wave(ledger.store, ours, ended)
        for wave in abandoned:
            if keys := [key for key in wave.keys if key in unreadable]:
                await open_wave(ledger.store, wave.model_copy(update={"keys": keys}))
            else:
                await delete_wave(ledger.store, wave)
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
    soon = find_expiring(owed, result_days)
    for entry, left in soon[:_TOLD]:
        logger.warning(
            "Row %s (task %s) is paid for and its result expires in %.1f days.",
            entry.key,
            entry.task.task_id,
            left.total_seconds() / 86_400,
        )
    if len(soon) > _TOLD:
        logger.warning("So do the results of %d more rows.", len(soon) - _TOLD)


def find_expiring(owed: Sequence[Entry], result_days: float) -> list[tuple[Entry, timedelta]]:
    """The rows whose results are gone in three days or less, and how long each still lives."""
    ends = timedelta(days=result_days)
    left = [
        (entry, entry.task.submitted_at + ends - utc_now())
        for entry in owed
        if entry.state is State.ACCEPTED
    ]
    return [(entry, lives) for entry, lives in left if lives < _WARN_BEFORE]


@dataclass
class LedgerStatus:
    """Where the rows of an output stand.

    Attributes:
        states: How many rows are in each state.
        spent: Dollars for all accepted attempts.
        doubtful: Dollars that unknown rows may have cost on top.
        outstanding: Rows paid for and not stored, the oldest first.
        unknown: Rows that may be paid for, whose run is gone.
    """

    states: Counter[State] = field(default_factory=Counter)
    spent: float = 0.0
    doubtful: float = 0.0
    outstanding: list[Entry] = field(default_factory=list)
    unknown: list[Entry] = field(default_factory=list)


async def read_ledger_status(store: RecordStore) -> LedgerStatus:
    """Read where all rows stand.

    Raises:
        LedgerError: The ledger cannot be read or is damaged.
    """
    status = LedgerStatus()
    rows: dict[str, tuple[int, State, float]] = {}
    # Unfinished waves first: one that ends meanwhile is then in both rather than in neither.
    for entry in await unfinished_entries(store):
        state = entry.state
        if state is State.INTENT and entry.intent is not None:
            if not await is_alive(store, entry.intent.owner):
                state = State.UNKNOWN
                status.unknown.append(entry)
                status.doubtful += entry.intent.price
        elif state is State.ACCEPTED:
            status.outstanding.append(entry)
        rows[entry.key] = (entry.attempt, state, entry.spent)
    async for row in read_finished_rows(store):
        if row.attempt >= rows.get(row.key, (0,))[0]:
            rows[row.key] = (row.attempt, State(row.ended.state), row.spent)
    status.outstanding.sort(key=lambda entry: entry.task.submitted_at)
    status.states.update(state for _, state, _ in rows.values())
    status.spent = sum(spent for _, _, spent in rows.values())
    return status


async def unfinished_entries(store: RecordStore) -> list[Entry]:
    """The rows of all unfinished waves, read one by one.

    Raises:
        LedgerError: One cannot be read or is damaged.
    """
    ledger = Ledger(store, owner="", prices={})
    keys = {key async for wave in read_open_waves(store) for key in wave.keys}
    return await asyncio.gather(*(ledger.read(key) for key in sorted(keys)))


PENDING_COLLECTION = "LEFT_TO_COLLECT"
"""Why a row that was submitted is outstanding: it was meant to be."""


class Deferral:
    """Lets rows wait for their results until nothing is left to submit, and no longer.

    An account has so many slots. While there are more rows than that, the rest can only be
    submitted as tasks end, so until then results are waited for and stored as ever.

    Args:
        on: Whether rows are left to be collected at all; else each waits to its end.
    """

    def __init__(self, *, on: bool) -> None:
        self._on = on
        self._to_submit: set[int] = set()
        self._all_read = False
        self._waiting: set[asyncio.Timeout] = set()

    def expect(self, rows: Iterable[Row | RefusedRow]) -> None:
        """Say which rows are about to be run."""
        self._to_submit.update(map(id, rows))

    def submitted(self, row: Row | RefusedRow) -> None:
        """Say that a row is accepted, or needs no slot."""
        self._to_submit.discard(id(row))
        self._end_waits()

    def all_read(self) -> None:
        """Say that no further row will come."""
        self._all_read = True
        self._end_waits()

    @asynccontextmanager
    async def waiting(self, row: Row) -> AsyncIterator[None]:
        """Wait for an accepted row's result inside, for as long as it is to be waited for.

        Raises:
            FluxKontextError: It is left to be collected.
        """
        self.submitted(row)
        try:
            async with asyncio.timeout(None) as wait:
                self._waiting.add(wait)
                self._end_waits()
                try:
                    yield
                finally:
                    self._waiting.discard(wait)
        except TimeoutError:
            raise FluxKontextError(
                "It is submitted and paid for; its result is left to be collected.",
                code=PENDING_COLLECTION,
            ) from None

    @property
    def _over(self) -> bool:
        return self._on and self._all_read and not self._to_submit

    def _end_waits(self) -> None:
        if self._over:
            for wait in self._waiting:
                wait.reschedule(0)
            self._waiting.clear()
