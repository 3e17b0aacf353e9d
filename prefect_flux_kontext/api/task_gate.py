"""The task limit from our side: so many tasks running at the service at once."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections import OrderedDict

_ASSUMED_RUNNING = 60.0
"""Seconds a task that nobody waits for here is taken to hold its slot: twice the mean."""

_SHORTEST_HOLD, _LONGEST_HOLD = 1.0, 30.0
"""Seconds without growth after a refused submit. They double while submits are refused with no
more tasks running than before, up to one mean generation, in which slots come free."""

_FIRST_POSTS = 8
"""POSTs under way at once to begin with: all of them are refused where the limit is lower
than we think, and in doubt when the process is killed."""


class TaskGate:
    """Room for so many tasks running at the service at once.

    A slot is taken before the POST and bound to the task id after it. Who waits for the task
    frees the slot when it ends; a task nobody waits for here is taken to end by itself.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._limit = slots
        self._grow_from = -math.inf
        self._hold = _SHORTEST_HOLD
        self._refused_with = 0
        self._posting = 0
        self._most_posting = _FIRST_POSTS
        self._watched: set[str] = set()
        self._unwatched: dict[str, float] = {}  # when each is taken to end, soonest first
        self._queue: OrderedDict[object, tuple[asyncio.Future[None], asyncio.AbstractEventLoop]]
        self._queue = OrderedDict()
        self._lock = threading.Lock()

    @property
    def running(self) -> int:
        """Tasks that hold a slot, those just being posted among them."""
        return self._posting + len(self._watched) + len(self._unwatched)

    async def enter(self) -> None:
        """Wait for a free slot and take it."""
        loop = asyncio.get_running_loop()
        place, queued = object(), False
        try:
            while True:
                with self._lock:
                    now = loop.time()
                    self._forget_ended(now)
                    if self._room() > 0:
                        self._posting += 1
                        return
                    called_in_vain = queued and place not in self._queue
                    woken: asyncio.Future[None] = loop.create_future()
                    self._queue[place] = (woken, loop)
                    if called_in_vain:
                        self._queue.move_to_end(place, last=False)
                    # A slot that comes free by itself calls nobody, so the first in the queue
                    # looks again when one does, and the others in case the first is gone.
                    look_again = now + _ASSUMED_RUNNING
                    if self._unwatched and next(iter(self._queue)) is place:
                        look_again = next(iter(self._unwatched.values()))
                queued = True
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(look_again):
                        await woken
        finally:
            if queued:
                with self._lock:
                    self._queue.pop(place, None)
                self._wake()  # the next is the first now, or was not called but this one

    def accepted(self, task_id: str) -> None:
        """The POST was accepted: the slot is the task's, until it ends or is taken to."""
        now = asyncio.get_running_loop().time()
        with self._lock:
            self._posting -= 1
            self._most_posting += 1
            if task_id not in self._watched:
                self._unwatched.setdefault(task_id, now + _ASSUMED_RUNNING)
            proven = self.running - self._posting
            if proven > self._refused_with:
                self._hold = _SHORTEST_HOLD
            grown = self._limit + 1 if now >= self._grow_from else self._limit
            self._limit = min(self.slots, max(grown, proven))
        self._wake()

    def not_accepted(self) -> None:
        """The POST was not accepted: its slot is free."""
        with self._lock:
            self._posting -= 1
        self._wake()

    def refused(self) -> None:
        """A submit got 429: room is for what runs now, and for no more during a while."""
        now = asyncio.get_running_loop().time()
        with self._lock:
            self._posting -= 1
            self._most_posting = _FIRST_POSTS
            self._refused_with = self.running - self._posting
            self._limit = max(1, min(self._limit, self._refused_with))
            self._grow_from = now + self._hold
            self._hold = min(_LONGEST_HOLD, 2 * self._hold)
        self._wake()

    def watched(self, task_id: str) -> None:
        """Somebody waits for this task: it holds a slot until `ended`."""
        with self._lock:
            self._unwatched.pop(task_id, None)
            self._watched.add(task_id)

    def ended(self, task_id: str) -> None:
        """The task is over, or nobody waits for it any more: its slot is free."""
        with self._lock:
            self._watched.discard(task_id)
            self._unwatched.pop(task_id, None)
        self._wake()

    def _room(self) -> int:
        return min(self._limit - self.running, self._most_posting - self._posting)

    def _forget_ended(self, now: float) -> None:
        while self._unwatched:
            task_id, ends = next(iter(self._unwatched.items()))
            if ends > now:
                break
            del self._unwatched[task_id]

    def _wake(self) -> None:
        """Wake as many as there is room for, and at least the first to set its alarm anew."""
        with self._lock:
            number = min(max(1, self._room()), len(self._queue))
            chosen = [self._queue.popitem(last=False)[1] for _ in range(number)]
        for woken, loop in chosen:
            try:
                loop.call_soon_threadsafe(_finish, woken)
            except RuntimeError:  # the waiter's loop is closed already: on to the next
                self._wake()


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
