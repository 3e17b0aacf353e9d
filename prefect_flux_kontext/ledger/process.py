"""This process as an owner of ledgers, for single requests: one heartbeat a process and ledger.

Prefect may run the tasks of one flow in many threads, each with an event loop of its own. The
heartbeat has a thread of its own, so that it outlives each of them.
"""

from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING

from prefect_flux_kontext.ledger.heartbeat import keep_heartbeat
from prefect_flux_kontext.ledger.probe import probe_store

if TYPE_CHECKING:
    from prefect_flux_kontext.ledger.store import RecordStore

_lock = threading.Lock()
_owners: dict[tuple[int, str], Future[str]] = {}


async def register_process(store: RecordStore, beat_seconds: float) -> str:
    """Probe the ledger's store, and return the name of this process as an owner of the ledger.

    Both is done once, however many tasks ask for it. The heartbeat goes on until the process
    ends. The record stays then, and counts as dead.

    Args:
        store: The ledger's records.
        beat_seconds: Seconds between two beats.

    Raises:
        ConfigurationError: The store cannot hold a ledger.
        LedgerError: The ledger cannot be written to.
    """
    key = os.getpid(), str(store)
    with _lock:
        registered = _owners.get(key)
        if registered is None or (registered.done() and registered.exception()):
            registered = _owners[key] = Future()
            thread = threading.Thread(
                target=lambda: asyncio.run(_beat(store, beat_seconds, registered)),
                name="flux-kontext-heartbeat",
                daemon=True,
            )
            thread.start()
    return await asyncio.wrap_future(registered)


async def _beat(store: RecordStore, beat_seconds: float, registered: Future[str]) -> None:
    try:
        await probe_store(store)
        async with keep_heartbeat(store, beat_seconds=beat_seconds) as heartbeat:
            registered.set_result(heartbeat.owner)
            await asyncio.Event().wait()
    except Exception as error:  # noqa: BLE001 - raised where the registration is awaited
        registered.set_exception(error)
