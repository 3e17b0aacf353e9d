"""What the ledger of an output says, without touching the service."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prefect_flux_kontext.ledger.checkpoints import finished_rows, open_waves
from prefect_flux_kontext.ledger.ledger import Ledger
from prefect_flux_kontext.ledger.owners import is_alive
from prefect_flux_kontext.ledger.states import State

if TYPE_CHECKING:
    from prefect_flux_kontext.ledger.records import Entry
    from prefect_flux_kontext.ledger.store import RecordStore


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


async def ledger_status(store: RecordStore) -> LedgerStatus:
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
    async for row in finished_rows(store):
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
    keys = {key async for wave in open_waves(store) for key in wave.keys}
    return await asyncio.gather(*(ledger.read(key) for key in sorted(keys)))
