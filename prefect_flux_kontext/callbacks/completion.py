"""Detection of the moment when every outstanding row of an output has had its callback.

Callbacks only trigger the check. The ledger says which rows are outstanding, and the inbox which
of them have had a callback. A check reads one record for each row of the open waves, so it waits
until callbacks pause and no run is active.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from prefect_flux_kontext.callbacks.tokens import Attempt
from prefect_flux_kontext.errors import FluxKontextError
from prefect_flux_kontext.ledger.heartbeat import is_alive
from prefect_flux_kontext.ledger.ledger import Ledger
from prefect_flux_kontext.ledger.records import State
from prefect_flux_kontext.ledger.waves import read_open_waves

if TYPE_CHECKING:
    from prefect_flux_kontext.callbacks.inbox import Callback, Inbox
    from prefect_flux_kontext.ledger.store import RecordStore

logger = logging.getLogger(__name__)

_QUIET = 5.0
"""Seconds without a callback before a check, so that a burst costs one check."""

_AGAIN = 15.0
"""Seconds before the next check while a run is active or nothing waits for the results."""

_RETRY_SECONDS = 60.0
"""Pause after an error of the ledger, the inbox or `ready`: an outage takes minutes."""

_READY_CALLS = 4
"""How often `ready` is called for the same rows: a run that has closed its ledger may be about to
suspend its flow run."""

_READ_BATCH = 8
"""Records read together. Callbacks are written by the same threads and must not queue."""


class CompletionMonitor:
    """Calls `ready` when every outstanding row of an output has had its callback.

    `ready` gets the outstanding attempts and returns whether anything waited for them. It is
    called again for the same ones if nothing did, or if it raised a FluxKontextError.
    """

    def __init__(
        self,
        ledger: RecordStore,
        inbox: Inbox,
        ready: Callable[[frozenset[Attempt]], Awaitable[bool]],
    ) -> None:
        self._store = ledger
        self._ledger = Ledger(ledger, owner="", prices={})
        self._inbox = inbox
        self._ready = ready
        self._attempts_by_file: dict[str, dict[str, set[Attempt]]] = {}
        self._has_new_callbacks = asyncio.Event()
        # Callbacks may have arrived before this process started.
        self._has_new_callbacks.set()

    def kept(self, _owner: str, _name: str, _callbacks: Sequence[Callback]) -> None:
        """Note that callbacks were stored; meant for `Inbox.on_kept`."""
        self._has_new_callbacks.set()

    async def watch(self) -> None:
        """Check each time after callbacks have arrived, until cancelled."""
        while True:
            await self._has_new_callbacks.wait()
            while self._has_new_callbacks.is_set():
                self._has_new_callbacks.clear()
                await asyncio.sleep(_QUIET)
            await self._check_until_done()

    async def _check_until_done(self) -> None:
        """Check until nothing is left to do or more callbacks arrive."""
        calls = 0
        while calls < _READY_CALLS and not self._has_new_callbacks.is_set():
            pause = _AGAIN
            try:
                if not await self._is_run_active():
                    attempts = await self.find_called_back()
                    if not attempts or await self._ready(attempts):
                        return
                    calls += 1
            except FluxKontextError as error:
                pause = _RETRY_SECONDS
                logger.warning(
                    "The check for completed results failed and is repeated in %.0f s: %s",
                    pause,
                    error,
                )
            await asyncio.sleep(pause)

    async def find_called_back(self) -> frozenset[Attempt]:
        """Return all outstanding attempts, or none if one of them has had no callback."""
        called_back: dict[str, set[Attempt]] = {}
        outstanding: set[Attempt] = set()
        keys = sorted({key async for wave in read_open_waves(self._store) for key in wave.keys})
        for start in range(0, len(keys), _READ_BATCH):
            block = keys[start : start + _READ_BATCH]
            entries = await asyncio.gather(*(self._ledger.read(key) for key in block))
            for entry in entries:
                if entry.state is not State.ACCEPTED or entry.intent is None:
                    continue
                attempt = Attempt(entry.intent.owner, entry.key, entry.attempt)
                if attempt.owner not in called_back:
                    called_back[attempt.owner] = await self._read_attempts(attempt.owner)
                if attempt not in called_back[attempt.owner]:
                    return frozenset()
                outstanding.add(attempt)
        self._attempts_by_file = {owner: self._attempts_by_file[owner] for owner in called_back}
        return frozenset(outstanding)

    async def _read_attempts(self, owner: str) -> set[Attempt]:
        """Return the attempts of a run that the inbox has callbacks for; read each file once."""
        known = self._attempts_by_file.get(owner, {})
        files = {name: known.get(name, set()) for name in await self._inbox.list_names(owner)}
        new = [name for name in files if name not in known]
        for start in range(0, len(new), _READ_BATCH):
            block = new[start : start + _READ_BATCH]
            read = await asyncio.gather(*(self._inbox.read(owner, name) for name in block))
            for name, callbacks in zip(block, read, strict=True):
                files[name] = {callback.attempt for callback in callbacks}
        self._attempts_by_file[owner] = files
        return set().union(*files.values())

    async def _is_run_active(self) -> bool:
        for name in await self._store.list_names("owners"):
            if await is_alive(self._store, name.removesuffix(".json")):
                return True
        return False
