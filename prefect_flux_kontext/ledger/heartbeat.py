"""Who is paying right now: a run says so, and others can tell whether it still lives.

A run on this machine lives while its process does, so a killed one is known at once and no
lock is left behind. A run elsewhere lives while its record is fresh. Nothing is paid on the
strength of this: the intent of a dead owner is held as unknown, not sent again.
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

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from prefect_flux_kontext.ledger.store import RecordStore

_BEAT = 15.0
_DEAD_AFTER = 60.0
"""Seconds without a beat: four were missed."""


def _process_started(pid: int) -> str | None:
    """What tells a process from a later one of the same number; None where it is gone."""
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


@contextlib.asynccontextmanager
async def keep_heartbeat(store: RecordStore, name: str | None = None) -> AsyncIterator[str]:
    """Be a known owner while the block runs; yields its name.

    Args:
        store: The ledger.
        name: What others know it by; None for a new name.

    Raises:
        LedgerError: The ledger cannot be written to.
    """
    owner = name or secrets.token_hex(8)
    record = f"owners/{owner}.json"
    await store.replace(record, _sign_of_life())
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
        LedgerError: The ledger cannot be read.
    """
    sign = await store.read(f"owners/{owner}.json")
    if sign is None:
        return False
    try:
        told = json.loads(sign)
        if told["host"] == socket.gethostname():
            started = _process_started(told["pid"])
            return started is not None and started == str(told["started"])
        return abs(time.time() - float(told["beat"])) < _DEAD_AFTER
    except (ValueError, KeyError, TypeError):
        raise LedgerError(f"The ledger record {store}/owners/{owner}.json is damaged.") from None


def _sign_of_life() -> bytes:
    pid = os.getpid()
    sign = {
        "host": socket.gethostname(),
        "pid": pid,
        "started": _process_started(pid),
        "beat": time.time(),
    }
    return json.dumps(sign).encode()


async def _beat(store: RecordStore, name: str) -> None:
    while True:
        await asyncio.sleep(_BEAT)
        with contextlib.suppress(LedgerError):
            await store.replace(name, _sign_of_life())
