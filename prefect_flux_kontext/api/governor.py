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

_RECOVERY = 120.0
"""Seconds in which a request rate that was halved grows e-fold again."""

_ASSUMED_RUNNING = 60.0
"""Seconds a task that nobody waits for here is taken to hold its slot: twice the mean."""

_SHRUNK_FOR = 30.0
"""Seconds without growth after a refused submit: one mean generation, so slots come free."""

_FIRST_POSTS = 8
"""POSTs under way at once to begin with: all of them are refused where the limit is lower
than we think, and in doubt when the process is killed."""


class RequestBudget:
    """At most `per_minute` requests in any sliding minute, after a small burst evenly spaced.

    A generic cell rate: with a burst of b and a spacing of i seconds, no window of 60 s holds
    more than b - 1 + 60 / i requests, so i is chosen to make that the limit.
    """

    def __init__(self, per_minute: int) -> None:
        usable = max(1, math.floor(per_minute * _HEADROOM))
        burst = max(1, usable // 50)
        self._closest = self._spacing = 60.0 / (usable - burst + 1)
        self._burst = self._tolerance = (burst - 1) * self._spacing
        self._next = -math.inf
        self._last = -math.inf
        self._paused_until = -math.inf
        self._pauses = 0
        self._lock = threading.Lock()

    async def take(self) -> None:
        """Wait until one more request may be sent."""
        loop = asyncio.get_running_loop()
        while True:
            with self._lock:
                now = loop.time()
                turn = max(self._next, now)
                self._next = turn + self._spacing
                pauses = self._pauses
                delay = turn - self._tolerance - now
            if delay > 0:
                await asyncio.sleep(delay)
            with self._lock:
                if pauses == self._pauses:
                    self._last = max(self._last, turn)
                    return

    def pause(self, seconds: float) -> None:
        """Let nobody through for so many seconds, and no burst after it."""
        now = asyncio.get_running_loop().time()
        with self._lock:
            self._paused_until = max(self._paused_until, now + seconds)
            # Neither a pause shorter than the spacing nor a tolerance that is given back
            # meanwhile must let the next one through early.
            self._next = max(self._paused_until + self._burst, self._last + self._spacing)
            self._pauses += 1

    def slow_down(self) -> None:
        """Halve the rate: the account's limit is lower than we were told, or others share it."""
        with self._lock:
            self._spacing = min(60.0, 2 * self._spacing)
            self._tolerance = 0.0

    def speed_up(self) -> None:
        """A request was answered: grow back, at a pace that does not depend on the rate."""
        with self._lock:
            if self._spacing > self._closest:
                grown = self._spacing * (1 - self._spacing / _RECOVERY)
                self._spacing = max(self._closest, grown)
            else:
                self._tolerance = self._burst


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
            self._limit = max(1, min(self._limit, self.running - self._posting))
            self._grow_from = now + _SHRUNK_FOR
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

    def refused(
        self,
        retry_after: float | None,
        *,
        sent_at: float | None = None,
        too_many_requests: bool = False,
    ) -> None:
        """A 429 came: all stay away for as long as the service asks, or by backoff.

        Requests that were under way when the first of them was refused are one refusal.

        Args:
            retry_after: Seconds the service asks to wait, where it says so.
            sent_at: Loop time at which the request was sent; None takes the present.
            too_many_requests: Whether it can only be the limit of requests, not that of tasks.
        """
        now = asyncio.get_running_loop().time()
        if (now if sent_at is None else sent_at) < self._paused_until:
            seconds = retry_after or 0.0
        else:
            self._streak += 1
            # Zero is no advice: who follows it is refused again at once.
            seconds = retry_after or jittered(self._streak)
            if too_many_requests:
                self.requests.slow_down()
        if now + seconds > self._paused_until:
            self._paused_until = now + seconds
            self.requests.pause(seconds)
            logger.info("Rate limited by the service (429): requests pause for %.1f s.", seconds)

    def heard(self) -> None:
        """A request was answered: the next backoff starts small again."""
        self._streak = 0
        self.requests.speed_up()


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
