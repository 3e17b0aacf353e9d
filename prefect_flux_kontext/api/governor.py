"""Keeping the account's two limits from our side, so that a 429 is the exception.

One governor serves a process and account: every client shares it, whichever thread or event
loop it runs on. So nothing in here belongs to a loop: state is guarded by a lock held for a
few instructions, and whoever has to wait sleeps on its own loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
import threading
from collections import OrderedDict

from prefect_flux_kontext.api.backoff import jittered

logger = logging.getLogger(__name__)

_HEADROOM = 0.98
"""Share of the limit we use: requests bunch a little on their way to the service."""

_ASSUMED_RUNNING = 60.0
"""Seconds a task that nobody waits for here is taken to hold its slot: twice the mean."""

_SHRUNK_FOR = 30.0
"""Seconds without growth after a refused submit: one mean generation, so slots come free."""


class RequestBudget:
    """At most `per_minute` requests in any sliding minute, after a small burst evenly spaced.

    A generic cell rate: with a burst of b and a spacing of i seconds, no window of 60 s holds
    more than b - 1 + 60 / i requests, so i is chosen to make that the limit.
    """

    def __init__(self, per_minute: int) -> None:
        usable = max(1, math.floor(per_minute * _HEADROOM))
        burst = max(1, usable // 50)
        self._spacing = 60.0 / (usable - burst + 1)
        self._tolerance = (burst - 1) * self._spacing
        self._next = -math.inf
        self._pauses = 0
        self._lock = threading.Lock()

    async def take(self) -> None:
        """Wait until one more request may be sent."""
        while True:
            now = asyncio.get_running_loop().time()
            with self._lock:
                turn = max(self._next, now)
                self._next = turn + self._spacing
                pauses = self._pauses
            delay = turn - self._tolerance - now
            if delay > 0:
                await asyncio.sleep(delay)
            if pauses == self._pauses:
                return

    def pause(self, seconds: float) -> None:
        """Let nobody through for so many seconds, and no burst after it."""
        now = asyncio.get_running_loop().time()
        with self._lock:
            self._next = now + seconds + self._tolerance
            self._pauses += 1


class TaskGate:
    """Room for so many tasks running at the service at once.

    A slot is taken before the POST and bound to the task id after it. Who waits for the task
    frees the slot when it ends; a task nobody waits for here is taken to end by itself.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._limit = slots
        self._grow_from = -math.inf
        self._posting = 0
        self._running: dict[str, float] = {}
        self._queue: OrderedDict[asyncio.Future[None], asyncio.AbstractEventLoop] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def running(self) -> int:
        """Tasks that hold a slot, those just being posted among them."""
        return self._posting + len(self._running)

    async def enter(self) -> None:
        """Wait for a free slot and take it."""
        loop = asyncio.get_running_loop()
        while True:
            with self._lock:
                soonest = self._soonest_end(loop.time())
                if self.running < self._limit:
                    self._posting += 1
                    return
                woken: asyncio.Future[None] = loop.create_future()
                self._queue[woken] = loop
            try:
                async with asyncio.timeout_at(soonest):
                    await woken
            except TimeoutError:
                continue
            except asyncio.CancelledError:
                self._wake()  # for the next in the queue: this one may have been called
                raise
            finally:
                with self._lock:
                    self._queue.pop(woken, None)

    def accepted(self, task_id: str) -> None:
        """The POST was accepted: the slot is the task's, until it ends or is taken to."""
        now = asyncio.get_running_loop().time()
        with self._lock:
            self._posting -= 1
            self._running.setdefault(task_id, now + _ASSUMED_RUNNING)
            if now >= self._grow_from:
                self._limit = min(self.slots, self._limit + 1)
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
            self._limit = max(1, min(self._limit, len(self._running)))
            self._grow_from = now + _SHRUNK_FOR

    def watched(self, task_id: str) -> None:
        """Somebody waits for this task: it holds a slot until `ended`."""
        with self._lock:
            self._running[task_id] = math.inf

    def ended(self, task_id: str) -> None:
        """The task is over, or nobody waits for it any more: its slot is free."""
        with self._lock:
            self._running.pop(task_id, None)
        self._wake()

    def _soonest_end(self, now: float) -> float | None:
        """When a slot comes free by itself, if any does; those that have are forgotten."""
        if self.running < self._limit:
            return None
        for task_id in [name for name, ends in self._running.items() if ends <= now]:
            del self._running[task_id]
        soonest = min(self._running.values(), default=math.inf)
        return None if math.isinf(soonest) else soonest

    def _wake(self) -> None:
        with self._lock:
            free = min(self._limit - self.running, len(self._queue))
            chosen = [self._queue.popitem(last=False) for _ in range(free)]
        for woken, loop in chosen:
            with contextlib.suppress(RuntimeError):  # the waiter's loop is closed already
                loop.call_soon_threadsafe(_finish, woken)


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Governor:
    """The account's request budget and task gate, and what a 429 does to them.

    Args:
        requests_per_minute: The account's limit of requests, submits and polls together.
        concurrent_tasks: The account's limit of tasks running at once.
    """

    def __init__(self, *, requests_per_minute: int, concurrent_tasks: int) -> None:
        self.limits = (requests_per_minute, concurrent_tasks)
        self.requests = RequestBudget(requests_per_minute)
        self.tasks = TaskGate(concurrent_tasks)
        self._streak = 0
        self._paused_until = -math.inf

    def refused(self, retry_after: float | None) -> None:
        """A 429 came: all stay away for as long as the service asks, or by backoff.

        Requests that were under way when the first of them was refused are one refusal.
        """
        now = asyncio.get_running_loop().time()
        if now < self._paused_until and retry_after is None:
            return
        self._streak += 1
        seconds = jittered(self._streak) if retry_after is None else retry_after
        self._paused_until = now + seconds
        self.requests.pause(seconds)
        logger.info("Rate limited by the service (429): requests pause for %.1f s.", seconds)

    def heard(self) -> None:
        """A request was answered: the next backoff starts small again."""
        self._streak = 0


_governors: dict[str, Governor] = {}
_registry_lock = threading.Lock()


def shared_governor(
    base_url: str, api_key: str, *, requests_per_minute: int, concurrent_tasks: int
) -> Governor:
    """The process's one governor for an account; with other limits than before, a new one."""
    account = hashlib.sha256(f"{base_url}\n{api_key}".encode()).hexdigest()
    limits = (requests_per_minute, concurrent_tasks)
    with _registry_lock:
        governor = _governors.get(account)
        if governor is None or governor.limits != limits:
            governor = Governor(
                requests_per_minute=requests_per_minute, concurrent_tasks=concurrent_tasks
            )
            _governors[account] = governor
        return governor
