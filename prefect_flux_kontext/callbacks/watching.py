"""Watching the inbox: one listing for all rows of a run every few seconds.

So callbacks wake the rows of a run wherever they were received. What this process has received
itself is not read again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from typing import TYPE_CHECKING

from prefect_flux_kontext.errors import LedgerError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from prefect_flux_kontext.callbacks.hints import Hints
    from prefect_flux_kontext.callbacks.inbox import Callback, Inbox
    from prefect_flux_kontext.callbacks.tokens import Attempt

logger = logging.getLogger(__name__)

_EVERY = 2.0
_READ_AT_ONCE = 16


class Watcher:
    """Takes callbacks from the inbox to the rows, and files away whose rows have ended.

    Args:
        inbox: Where callbacks are kept.
        hints: Where rows are told of them.
        owner: This run. Other runs' callbacks count only for the attempts that were claimed.
    """

    def __init__(self, inbox: Inbox, hints: Hints, owner: str) -> None:
        self._inbox = inbox
        self._hints = hints
        self._owner = owner
        self._files: defaultdict[str, dict[str, set[Attempt]]] = defaultdict(dict)
        self._unclaimed: defaultdict[Attempt, list[str | None]] = defaultdict(list)
        self._claimed: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._damaged: set[str] = set()

    async def watch(self) -> None:
        """Look for new files for ever."""
        while True:
            await asyncio.sleep(_EVERY)
            for owner in (self._owner, *self._claimed):
                await self._look(owner)
            await self.remove_ended()

    async def claim(self, attempt: Attempt) -> None:
        """Tell the row what was heard of an attempt that an ended run has made."""
        if attempt.owner == self._owner:
            return
        async with self._claimed[attempt.owner]:
            if attempt.owner not in self._files:
                self._files[attempt.owner] = {}
                await self._look(attempt.owner)
        for task_id in self._unclaimed.pop(attempt, ()):
            self._hints.hear(attempt, task_id)

    def kept(self, owner: str, name: str, callbacks: Sequence[Callback]) -> None:
        """Take up a file of callbacks that has just been written or read."""
        self._files[owner][name] = {callback.attempt for callback in callbacks}
        for callback in callbacks:
            attempt = callback.attempt
            if owner == self._owner or self._hints.expected(attempt):
                self._hints.hear(attempt, callback.task_id)
            else:
                self._unclaimed[attempt].append(callback.task_id)

    async def remove_ended(self) -> None:
        """Remove the files of which every row has ended."""
        files = self._files[self._owner]
        over = [name for name, told in files.items() if all(map(self._hints.is_over, told))]
        for name in over:
            try:
                await self._inbox.remove(self._owner, name)
            except LedgerError as error:
                logger.warning("A record of callbacks stays where it is: %s", error)
                return
            del files[name]

    async def clear(self, owners: Iterable[str]) -> None:
        """Remove what ended runs were told: what they owed is settled, or the run's own by now."""
        for owner in owners:
            try:
                for name in await self._inbox.names(owner):
                    await self._inbox.remove(owner, name)
            except LedgerError as error:
                logger.warning("Callbacks of an ended run stay where they are: %s", error)

    async def _look(self, owner: str) -> None:
        try:
            names = await self._inbox.names(owner)
            new = [name for name in names if name not in self._files[owner]]
            for start in range(0, len(new), _READ_AT_ONCE):
                block = new[start : start + _READ_AT_ONCE]
                await asyncio.gather(*(self._read(owner, name) for name in block))
        except LedgerError as error:
            # Rows are looked at now and then in any case.
            logger.warning("Callbacks cannot be looked for: %s", error)

    async def _read(self, owner: str, name: str) -> None:
        try:
            callbacks = await self._inbox.read(owner, name)
        except LedgerError as error:
            if name not in self._damaged:
                self._damaged.add(name)
                logger.warning("%s", error)
            return
        if name not in self._files[owner]:  # received here meanwhile
            self.kept(owner, name, callbacks)
