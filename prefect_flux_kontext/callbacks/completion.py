"""Whether everything that an output is owed was called back, and who is told when it was.

Told of by whoever received the last callback. What was received says only when to look: the
ledger says which rows are owed, and the inbox which of them were called back. A look reads as
many records as rows are owed, so none is taken while callbacks come or a run lives.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from prefect_flux_kontext.callbacks.tokens import Attempt
from prefect_flux_kontext.errors import FluxKontextError
from prefect_flux_kontext.ledger.heartbeat import is_alive
from prefect_flux_kontext.ledger.ledger import Ledger
from prefect_flux_kontext.ledger.records import State
from prefect_flux_kontext.ledger.waves import read_open_waves

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from prefect_flux_kontext.callbacks.inbox import Callback, Inbox
    from prefect_flux_kontext.ledger.records import Entry
    from prefect_flux_kontext.ledger.store import RecordStore

logger = logging.getLogger(__name__)

_QUIET = 5.0
"""Seconds without a callback after which it is worth a look."""

_AGAIN = 15.0
_AFTER_TROUBLE = 60.0
_CALLS = 4
"""How often `ready` is called for the same rows: a run whose ledger is closed may still be about
to be suspended."""

_READ_AT_ONCE = 8
"""Records read together: callbacks are written by the same threads, and must not queue."""


class CompletionMonitor:
    """Calls `ready` when every row that is paid for and has not ended was called back.

    Args:
        ledger: The output's ledger.
        inbox: Where the receiver keeps callbacks.
        ready: Given the attempts that were called back; returns whether anybody waited for them.
            Called again for the same ones where nobody did, or it raises a FluxKontextError.
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
        self._files: dict[str, dict[str, set[Attempt]]] = {}
        self._news = asyncio.Event()
        self._news.set()  # what came before we did

    def kept(self, _owner: str, _name: str, _callbacks: Sequence[Callback]) -> None:
        """Callbacks were kept; for `Inbox.on_kept`."""
        self._news.set()

    async def watch(self) -> None:
        """Look for ever, each time after callbacks came."""
        while True:
            await self._news.wait()
            while self._news.is_set():
                self._news.clear()
                await asyncio.sleep(_QUIET)
            await self._follow()

    async def _follow(self) -> None:
        """Look until there is nothing more to be done, or callbacks come again."""
        calls = 0
        while calls < _CALLS and not self._news.is_set():
            pause = _AGAIN
            try:
                if not await self._a_run_lives():
                    rows = await self.all_come()
                    if not rows or await self._ready(rows):
                        return
                    calls += 1
            except FluxKontextError as error:
                pause = _AFTER_TROUBLE
                logger.warning(
                    "Whether all results are there could not be found out or told, and is tried "
                    "again in %.0f s: %s",
                    pause,
                    error,
                )
            await asyncio.sleep(pause)

    async def all_come(self) -> frozenset[Attempt]:
        """The attempts that are owed a result, if all were called back; none where one was not.

        Raises:
            LedgerError: The ledger or the inbox cannot be read or is damaged.
        """
        come: dict[str, set[Attempt]] = {}
        owed: set[Attempt] = set()
        keys = sorted({key async for wave in read_open_waves(self._store) for key in wave.keys})
        for start in range(0, len(keys), _READ_AT_ONCE):
            block = keys[start : start + _READ_AT_ONCE]
            entries = await asyncio.gather(*(self._ledger.read(key) for key in block))
            for attempt in map(_owed, entries):
                if attempt is None:
                    continue
                if attempt.owner not in come:
                    come[attempt.owner] = await self._come(attempt.owner)
                if attempt not in come[attempt.owner]:
                    return frozenset()
                owed.add(attempt)
        self._files = {owner: self._files[owner] for owner in come}
        return frozenset(owed)

    async def _come(self, owner: str) -> set[Attempt]:
        """What the inbox holds of a run; each file is read once."""
        known = self._files.get(owner, {})
        files = {name: known.get(name, set()) for name in await self._inbox.names(owner)}
        new = [name for name in files if name not in known]
        for start in range(0, len(new), _READ_AT_ONCE):
            block = new[start : start + _READ_AT_ONCE]
            read = await asyncio.gather(*(self._inbox.read(owner, name) for name in block))
            for name, callbacks in zip(block, read, strict=True):
                files[name] = {callback.attempt for callback in callbacks}
        self._files[owner] = files
        return set().union(*files.values())

    async def _a_run_lives(self) -> bool:
        for name in await self._store.names("owners"):
            if await is_alive(self._store, name.removesuffix(".json")):
                return True
        return False


def _owed(entry: Entry) -> Attempt | None:
    """The attempt whose result is still to be stored, if there is one."""
    if entry.state is not State.ACCEPTED or entry.intent is None:
        return None
    return Attempt(entry.intent.owner, entry.key, entry.attempt)
