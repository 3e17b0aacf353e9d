"""Heartbeats of running batches, by which other runs see whether an owner is alive.

Where processes can be compared (same boot, same PID namespace), a run is alive while its process
is, so a killed run is detected immediately. Elsewhere it is alive while its heartbeat is fresh.
Nothing is paid because of this: the intent of a dead owner is held as unknown, not submitted
again.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import secrets
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect_flux_kontext.errors import LedgerError
from prefect_flux_kontext.ledger.records import RECORD_VERSION, check_version

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from prefect_flux_kontext.ledger.store import RecordStore

DEFAULT_BEAT_SECONDS = 15.0
_MISSED_BEATS = 4
"""A heartbeat counts as dead after this many beats without a new one."""

_RECHECK_SECONDS = 2.0

_UNREADABLE = "unreadable"
"""Start of a process that /proc hides (its option hidepid)."""


class Heartbeat:
    """The heartbeat of this run.

    Args:
        owner: The name of this run.
        beat_seconds: Seconds between two beats.
        has_budget: Whether this run keeps a budget, so that nothing else may pay meanwhile.

    Attributes:
        owner: The name of this run.
    """

    def __init__(
        self,
        owner: str,
        beat_seconds: float = DEFAULT_BEAT_SECONDS,
        *,
        has_budget: bool = False,
    ) -> None:
        self.owner = owner
        self._has_budget = has_budget
        self._beat_seconds = beat_seconds
        self._last_beat = time.time()

    @property
    def is_overdue(self) -> bool:
        """Whether other machines may count this run as dead, for example after a freeze."""
        return time.time() - self._last_beat >= _MISSED_BEATS * self._beat_seconds

    async def beat(self, store: RecordStore) -> None:
        """Write the heartbeat.

        Raises:
            LedgerError: The ledger cannot be written to.
        """
        pid, now = os.getpid(), time.time()
        record = {
            "version": RECORD_VERSION,
            "host": socket.gethostname(),
            "machine": _find_machine(),
            "pid": pid,
            "started": _read_process_start(pid),
            "beat": now,
            "beat_seconds": self._beat_seconds,
            "has_budget": self._has_budget,
        }
        await store.replace(_get_record_name(self.owner), json.dumps(record).encode())
        self._last_beat = now

    async def keep_beating(self, store: RecordStore) -> None:
        """Write the heartbeat again and again, also after an outage of the store."""
        while True:
            await asyncio.sleep(self._beat_seconds)
            with contextlib.suppress(LedgerError):
                await self.beat(store)


@contextlib.asynccontextmanager
async def keep_heartbeat(
    store: RecordStore,
    name: str | None = None,
    *,
    beat_seconds: float = DEFAULT_BEAT_SECONDS,
    has_budget: bool = False,
) -> AsyncIterator[Heartbeat]:
    """Register as an owner while the block runs.

    Args:
        store: The ledger's records.
        name: The owner's name; None makes a new one.
        beat_seconds: Seconds between two beats.
        has_budget: Whether this run keeps a budget.

    Raises:
        LedgerError: The ledger cannot be written to.
    """
    heartbeat = Heartbeat(name or secrets.token_hex(8), beat_seconds, has_budget=has_budget)
    await heartbeat.beat(store)
    beating = asyncio.create_task(heartbeat.keep_beating(store))
    try:
        yield heartbeat
    finally:
        beating.cancel()
        # A beat that is being written would create the record again.
        await asyncio.wait({beating})
        with contextlib.suppress(LedgerError):
            await store.remove(_get_record_name(heartbeat.owner))


async def is_alive(store: RecordStore, owner: str) -> bool:
    """Whether the run of that name may still be about to pay.

    Raises:
        LedgerError: The ledger cannot be read, or the owner's record is damaged.
    """
    record = await _read_record(store, owner)
    return record is not None and _is_fresh(record)


async def find_budget_run(store: RecordStore) -> str | None:
    """Return the name of a living run that keeps a budget, if there is one.

    Raises:
        LedgerError: The ledger cannot be read, or the record of an owner is damaged.
    """
    for name in await store.list_names("owners"):
        owner = name.removesuffix(".json")
        record = await _read_record(store, owner)
        if record is not None and record.get("has_budget") and _is_fresh(record):
            return owner
    return None


async def wait_for_dead(store: RecordStore, owner: str) -> bool:
    """Wait until it is known whether a run is dead: a minute for one that died elsewhere.

    Returns:
        True if it is dead; False if its process lives, or it has written a new heartbeat.

    Raises:
        LedgerError: The ledger cannot be read, or the owner's record is damaged.
    """
    first = await _read_record(store, owner)
    record = first
    while record is not None and _is_fresh(record):
        if _find_process_state(record) is not None or record["beat"] != (first or {})["beat"]:
            return False
        await asyncio.sleep(_RECHECK_SECONDS)
        record = await _read_record(store, owner)
    return True


def _get_record_name(owner: str) -> str:
    return f"owners/{owner}.json"


async def _read_record(store: RecordStore, owner: str) -> dict[str, Any] | None:
    data = await store.read(_get_record_name(owner))
    if data is None:
        return None
    try:
        record: dict[str, Any] = json.loads(data)
        check_version(record.get("version", RECORD_VERSION))
        _is_fresh(record)  # reads every field that is needed
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        raise LedgerError(
            f"The ledger record {store}/{_get_record_name(owner)} is damaged. If no run pays into "
            "this output, remove it."
        ) from None
    return record


def _is_fresh(record: dict[str, Any]) -> bool:
    lives = _find_process_state(record)
    beat, beat_seconds = float(record["beat"]), float(record.get("beat_seconds", 15.0))
    return abs(time.time() - beat) < _MISSED_BEATS * beat_seconds if lives is None else lives


def _find_process_state(record: dict[str, Any]) -> bool | None:
    """Return whether the owner's process lives; None if that cannot be seen from here."""
    if record["machine"] != _find_machine():
        return None
    started = _read_process_start(record["pid"])
    if started == _UNREADABLE:
        return None
    return started is not None and bool(started == record["started"])


@functools.cache
def _find_machine() -> str:
    """Return what processes that can see each other's ids share: a boot and a PID namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = Path("/proc/self/ns/pid").readlink()
    except OSError:
        return socket.gethostname()
    return f"{boot} {namespace}"


def _read_process_start(pid: int) -> str | None:
    """Return what distinguishes a process from a later one with its id.

    Returns:
        None if the process is gone; `_UNREADABLE` if its start may not be read.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return _UNREADABLE if Path("/proc/self/stat").exists() else "running"
