"""Collection of outstanding results."""

from __future__ import annotations

import asyncio
import logging
from datetime import timedelta
from typing import TYPE_CHECKING

from prefect_flux_kontext.batch.result_rows import line_from_entry, row_from_entry
from prefect_flux_kontext.batch.summary import BatchSummary, RowOutcome
from prefect_flux_kontext.batch.waves import RunWave, run_waves
from prefect_flux_kontext.errors import LedgerError
from prefect_flux_kontext.ledger.heartbeat import is_alive
from prefect_flux_kontext.ledger.ledger import Ledger
from prefect_flux_kontext.ledger.records import OUTSTANDING_STATES, Entry, State
from prefect_flux_kontext.ledger.waves import (
    OpenWave,
    close_wave,
    delete_wave,
    open_wave,
    read_open_waves,
)
from prefect_flux_kontext.models import utc_now

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from prefect_flux_kontext.batch.session import Session
    from prefect_flux_kontext.ledger.store import RecordStore

logger = logging.getLogger(__name__)

_EXPIRY_WARNING = timedelta(days=3)
"""How long before its result expires an outstanding row is reported."""

_MAX_EXPIRY_WARNINGS = 20

_FIRST_COLLECTION_WAVE = 500_001
"""Number of the first collecting wave, so that no number is also one of the manifest's waves."""


async def collect_outstanding(
    session: Session, run_wave: RunWave, *, concurrent_tasks: int
) -> BatchSummary:
    """Wait for, download and store the outstanding results of ended runs; pay for nothing.

    Raises:
        LedgerError: The ledger cannot be reached.
    """
    session.submits = False
    ledger = session.ledger
    others = [wave async for wave in read_open_waves(ledger.store) if wave.owner != ledger.owner]
    abandoned = [wave for wave in others if await _is_abandoned(ledger, wave)]
    keys = {key for wave in abandoned for key in wave.keys}
    entries, unreadable = await _read_entries(ledger, keys)
    outstanding = [entry for entry in entries if entry.state in OUTSTANDING_STATES]
    # The oldest first: its result is the next to expire.
    outstanding.sort(key=lambda entry: entry.intent.at if entry.intent else utc_now())
    _warn_of_expiry(outstanding, session.options.result_days)
    rows = [row_from_entry(entry) for entry in outstanding]
    summary = await run_waves(
        session, rows, run_wave, concurrent_tasks=concurrent_tasks, first=_FIRST_COLLECTION_WAVE
    )
    # The run of an ended row may have died before it wrote the row to the result manifest.
    lines = [line_from_entry(session, entry) for entry in entries if entry.ended is not None]
    if lines:
        await session.report.add(_FIRST_COLLECTION_WAVE - 1, lines)
    for key, error in unreadable.items():
        summary.count(
            RowOutcome(id=key, line=0, state="failed", reason=error.reason, message=error.message)
        )
    if abandoned and session.submitter.stopped is None:
        # Their outstanding rows are in waves of this run by now; unreadable rows stay in theirs.
        ended = [entry for entry in entries if entry.state not in OUTSTANDING_STATES]
        ours = OpenWave(name=f"{ledger.owner}-ended", owner=ledger.owner, keys=[])
        await close_wave(ledger.store, ours, ended)
        for wave in abandoned:
            if kept := [key for key in wave.keys if key in unreadable]:
                await open_wave(ledger.store, wave.model_copy(update={"keys": kept}))
            else:
                await delete_wave(ledger.store, wave)
        if others == abandoned:  # else a living run may still wait for callbacks of such rows
            owners = {entry.intent.owner for entry in outstanding if entry.intent is not None}
            await session.callbacks.clear(owners | {wave.owner for wave in abandoned})
    return summary


async def _is_abandoned(ledger: Ledger, wave: OpenWave) -> bool:
    """Whether the wave's run is dead; a run with an unreadable heartbeat counts as alive."""
    try:
        return not await is_alive(ledger.store, wave.owner)
    except LedgerError as error:
        logger.warning("Rows of an earlier run were not collected: %s", error)
        return False


async def _read_entries(
    ledger: Ledger, keys: Iterable[str]
) -> tuple[Sequence[Entry], dict[str, LedgerError]]:
    """Read rows; return their entries, and the errors of the unreadable ones by row key."""
    unreadable: dict[str, LedgerError] = {}

    async def read(key: str) -> Entry | None:
        try:
            return await ledger.read(key)
        except LedgerError as error:
            unreadable[key] = error
            return None

    read_all = await asyncio.gather(*map(read, sorted(keys)))
    return [entry for entry in read_all if entry is not None], unreadable


def _warn_of_expiry(outstanding: Sequence[Entry], result_days: float) -> None:
    expiring = find_expiring(outstanding, result_days)
    for entry, left in expiring[:_MAX_EXPIRY_WARNINGS]:
        logger.warning(
            "Row %s (task %s) is paid for and its result expires in %.1f days.",
            entry.key,
            entry.task.task_id,
            left.total_seconds() / 86_400,
        )
    if len(expiring) > _MAX_EXPIRY_WARNINGS:
        logger.warning(
            "The results of %d more rows expire soon.", len(expiring) - _MAX_EXPIRY_WARNINGS
        )


def find_expiring(
    outstanding: Sequence[Entry], result_days: float
) -> list[tuple[Entry, timedelta]]:
    """Return the rows whose results expire within three days, each with the time until then."""
    lifetime = timedelta(days=result_days)
    remaining = [
        (entry, entry.task.submitted_at + lifetime - utc_now())
        for entry in outstanding
        if entry.state is State.ACCEPTED
    ]
    return [(entry, left) for entry, left in remaining if left < _EXPIRY_WARNING]


async def read_unfinished_entries(store: RecordStore) -> list[Entry]:
    """Read the rows of all unfinished waves from their own records.

    Raises:
        LedgerError: A record cannot be read or is damaged.
    """
    ledger = Ledger(store, owner="", prices={})
    keys = {key async for wave in read_open_waves(store) for key in wave.keys}
    return await asyncio.gather(*(ledger.read(key) for key in sorted(keys)))
