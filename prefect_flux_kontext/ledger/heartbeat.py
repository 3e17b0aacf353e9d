"""Heartbeats of running batches, by which other runs see whether an owner is alive.

A run on this machine is alive while its process is, so a killed run is detected immediately and
leaves no lock behind. A run on another machine is alive while its record is fresh. Nothing is
paid because of this: the intent of a dead owner is held as unknown, not submitted again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

from prefect_flux_kontext.errors import LedgerError
from prefect_flux_kontext.ledger.records import RECORD_VERSION

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from prefect_flux_kontext.ledger.store import RecordStore

_HEARTBEAT_SECONDS = 15.0
_STALE_AFTER_SECONDS = 60.0
"""Age at which a heartbeat from another machine counts as dead: four beats were missed."""


@contextlib.asynccontextmanager
async def keep_heartbeat(store: RecordStore, name: str | None = None) -> AsyncIterator[str]:
    """Register as an owner while the block runs, and yield the owner's name.

    Args:
        store: The ledger's records.
        name: The owner's name; None makes a new one.

    Raises:
        LedgerError: The ledger cannot be written to.
    """
    owner = name or secrets.token_hex(8)
    record = f"owners/{owner}.json"
    await store.replace(record, _make_heartbeat())
    beating = asyncio.create_task(_beat(store, record))
    try:
        yield owner
    finally:
        beating.cancel()
        with contextlib.suppress(LedgerError):
            await store.remove(record)


async def is_alive(store: RecordStore, owner: str) -> bool:
    """Whether the run of that name may still be about to pay.

    Raises:
        LedgerError: The ledger cannot be read, or the owner's record is damaged.
    """
    record = await store.read(f"owners/{owner}.json")
    if record is None:
        return False
    try:
        heartbeat = json.loads(record)
        if heartbeat["host"] == socket.gethostname():
            started = _read_process_start(heartbeat["pid"])
            return started is not None and started == str(heartbeat["started"])
        return abs(time.time() - float(heartbeat["beat"])) < _STALE_AFTER_SECONDS
    except (ValueError, KeyError, TypeError):
        raise LedgerError(f"The ledger record {store}/owners/{owner}.json is damaged.") from None


def _make_heartbeat() -> bytes:
    pid = os.getpid()
    heartbeat = {
        "version": RECORD_VERSION,
        "host": socket.gethostname(),
        "pid": pid,
        "started": _read_process_start(pid),
        "beat": time.time(),
    }
    return json.dumps(heartbeat).encode()


def _read_process_start(pid: int) -> str | None:
    """Return what distinguishes a process from a later one with its id; None if it is gone."""
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
    return "running"


async def _beat(store: RecordStore, name: str) -> None:
    while True:
        await asyncio.sleep(_HEARTBEAT_SECONDS)
        with contextlib.suppress(LedgerError):
            await store.replace(name, _make_heartbeat())
