"""How many of the tasks we watch still run at the service, as far as can be told."""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prefect_flux_kontext.client.limits.latency_model import SurvivalTable
from prefect_flux_kontext.client.limits.waiters import finish, wake
from prefect_flux_kontext.client.retry import RejectionRate, jittered_backoff

if TYPE_CHECKING:
    from collections.abc import Collection

    from prefect_flux_kontext.client.limits.latency_model import LatencyModel

_ENOUGH = 50
"""Tasks that must have ended before their curve is trusted with submits."""

_STALE = 0.2
"""Seconds for which a count is used before it is made again."""

_NOTHING_KNOWN = SurvivalTable([1.0], [], 0.0)


@dataclass(slots=True)
class Watched:
    """A task that somebody waits for.

    Attributes:
        began: Loop time at which its submit was answered.
        curve: How long tasks of its kind take; None where nothing is known.
        reached: Age in seconds at which it was last seen to run.
    """

    began: float
    curve: LatencyModel | None = None
    reached: float = 0.0


class RunningEstimate:
    """Counts each watched task as much as it is likely to run.

    A task's end is noticed seconds after it has come, and meanwhile its slot is free. Of a
    thousand tasks it is well known how many have ended, though not which.

    Attributes:
        mean: Tasks that are expected to run.
        deviation: Standard deviation of how many really do, by the dice and by the curve's error.
    """

    def __init__(self) -> None:
        self.mean = self.deviation = 0.0
        self._counted_at = -math.inf

    def refresh(self, watched: Collection[Watched], now: float, ahead: float) -> None:
        """Count them as they will be `ahead` seconds from now, unless it was just done."""
        if now < self._counted_at + _STALE:
            return
        self._counted_at = now
        at = now + ahead + _STALE / 2
        mean = variance = 0.0
        tables: dict[LatencyModel | None, tuple[SurvivalTable, list[float]]] = {}
        for task in watched:  # a thousand of them, several times a second
            if task.curve not in tables:
                curve = task.curve
                trusted = curve is not None and curve.known >= _ENOUGH
                table = curve.table() if curve and trusted else _NOTHING_KNOWN
                tables[task.curve] = table, [0.0] * len(table.shares)
            (shares, _, per_second), alike = tables[task.curve]
            last = len(shares) - 1
            cell = min(last, int((at - task.began) * per_second))
            since = min(last, int(task.reached * per_second))
            if since < cell:
                share = shares[cell] / shares[since]
                mean += share
                variance += share * (1 - share)
                alike[since] += share
                alike[cell] -= share
            else:
                mean += 1
        for table, alike in tables.values():
            # Where the curve is wrong, it is for all tasks of such an age alike.
            for depend, doubt in zip(itertools.accumulate(alike), table.doubts, strict=False):
                variance += depend**2 * doubt
        self.mean, self.deviation = mean, math.sqrt(variance)

    def one_more(self) -> None:
        """Another task is watched, which has only just begun."""
        self.mean += 1


_ASSUMED_RUNNING = 60.0
"""Seconds a task that nobody waits for here is taken to hold its slot: twice the mean."""

_SHORTEST_HOLD, _LONGEST_HOLD, _RARELY = 1.0, 120.0, 10.0
"""Seconds without growth after a refused submit. They double with each refusal that follows
another within ten times as long, and halve with each that comes later."""

_CAUTION = 1.8
"""Standard deviations that the count of likely running tasks stays below the limit."""

_ONCE_BITTEN, _FORGIVEN = 1.5, 1.0
"""Where that was refused, it stays so many times as far away as it was, and comes nearer again,
e-fold while each slot is filled so often."""

_LOOK_AGAIN = 0.2
"""Seconds after which tasks may be taken to have ended that nobody has seen to end."""

_FIRST_POSTS, _UNSURE_POSTS, _MOST_POSTS = 8, 16, 32
"""POSTs under way at once: to begin with, when they count on tasks that have likely ended, and
at most. All of them are refused where the limit is lower than we think."""

_WEIGHT, _LONGEST_WAY = 0.05, 1.0
"""Of each submit in the mean of their ways, and the seconds of one that count at most: one that
a pause has held up tells nothing of the next."""

_SAME = 0.1
"""Part by which two counts of tasks may differ that stand for the same limit."""


class ConcurrencyLimiter:
    """Room for so many tasks running at the service at once.

    A slot is taken before the POST and bound to the task id after it. Who waits for the task
    frees the slot when it ends; a task nobody waits for here is taken to end by itself. Where it
    is known how long tasks take, those that wait for a look are counted by how likely they run.

    Attributes:
        round_trip: Seconds from sending a request to its answer, as a running mean.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.round_trip = 0.0
        self._limit = slots
        self._ceiling = math.inf  # tasks that ran when a limit was last met
        self._refusals = RejectionRate()
        self._refused_at = self._grow_from = self._closed_until = -math.inf
        self._hold = _SHORTEST_HOLD
        self._missed = 0.0  # tasks by which the count of likely running ones was wrong
        self._way = 0.0  # seconds from a taken slot to an accepted task, as a running mean
        self._posting = 0
        self._most_posting = _FIRST_POSTS
        self._estimate = RunningEstimate()
        self._watched: dict[str, Watched] = {}
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
                    if self._room(now) > 0:
                        self._posting += 1
                        return
                    called_in_vain = queued and place not in self._queue
                    woken: asyncio.Future[None] = loop.create_future()
                    self._queue[place] = (woken, loop)
                    if called_in_vain:
                        self._queue.move_to_end(place, last=False)
                    first = next(iter(self._queue)) is place
                    seconds = self._until_it_may_open(now) if first else _ASSUMED_RUNNING
                queued = True
                alarm = loop.call_later(seconds, finish, woken)
                try:
                    await woken
                finally:
                    alarm.cancel()
        finally:
            if queued:
                with self._lock:
                    self._queue.pop(place, None)
                self._wake(loop.time())  # the next is the first, or was not called but this one

    def accepted(self, task_id: str, *, entered_at: float | None = None) -> None:
        """The POST was accepted: the slot is the task's, until it ends or is taken to.

        Args:
            task_id: The task.
            entered_at: Loop time at which its slot was taken; None for a task of another run.
        """
        now = asyncio.get_running_loop().time()
        with self._lock:
            if entered_at is not None:
                self._way += _WEIGHT * (min(now - entered_at, _LONGEST_WAY) - self._way)
            self._refusals.heard()
            self._missed *= 1 - 1 / (_FORGIVEN * self.slots + 1)
            self._posting -= 1
            self._most_posting = min(_MOST_POSTS, self._most_posting + 1)
            if task_id not in self._watched:
                self._unwatched.setdefault(task_id, now + _ASSUMED_RUNNING)
            proven = self._proven()
            if proven > (1 + _SAME) * self._ceiling + 1:
                self._ceiling = math.inf
            grown = self._limit + 1 if now >= self._grow_from else self._limit
            self._limit = min(self.slots, max(grown, math.floor(proven)))
        self._wake(now)

    def not_accepted(self) -> None:
        """The POST was not accepted: its slot is free."""
        with self._lock:
            self._posting -= 1
        self._wake(asyncio.get_running_loop().time())

    def refused(self, *, entered_at: float | None = None) -> None:
        """A submit got 429: room is for what runs, for a while.

        But not for a single refusal that no limit explains.

        Args:
            entered_at: Loop time at which its slot was taken; None takes the present.
        """
        now = asyncio.get_running_loop().time()
        with self._lock:
            self._posting -= 1
            self._refusals.refused()
            overbooked = self.running - self._posting > self._limit
            another = entered_at is None or entered_at > self._refused_at
            grown_again = now >= self._grow_from or not another
            where_before = (
                grown_again
                and self._refusals.some
                and self._proven() >= (1 - _SAME) * self._ceiling
            )
            if overbooked or where_before or self._refusals.many:
                self._shrink(now, overbooked=overbooked, another=another)
            elif not grown_again:
                # With no more tasks than were accepted before: so it was no limit before.
                self._grow_from = now
        self._wake(now)

    def watched(
        self, task_id: str, *, curve: LatencyModel | None = None, age: float = 0.0
    ) -> None:
        """Somebody waits for this task: it holds a slot until `ended`.

        Args:
            task_id: The task.
            curve: How long such tasks take. Without one, it holds its slot for good.
            age: Seconds since it was submitted.
        """
        now = asyncio.get_running_loop().time()
        with self._lock:
            self._unwatched.pop(task_id, None)
            self._watched[task_id] = Watched(now - age, curve)
            self._estimate.one_more()

    def runs(self, task_id: str, age: float) -> None:
        """The task was seen to run, at so many seconds after its submit."""
        with self._lock:
            if task_id in self._watched:
                self._watched[task_id].reached = age

    def ended(self, task_id: str) -> None:
        """The task is over, or nobody waits for it any more: its slot is free."""
        with self._lock:
            self._watched.pop(task_id, None)
            self._unwatched.pop(task_id, None)
        self._wake(asyncio.get_running_loop().time())

    def _shrink(self, now: float, *, overbooked: bool, another: bool) -> None:
        self._most_posting = _FIRST_POSTS
        self._estimate.refresh(self._watched.values(), now, self._way)
        proven = self._proven()
        if overbooked:
            # The count of likely ends was wrong, or else it is the limit: one thing at a time.
            if another:
                missed = self._limit - proven - self._posting
                self._missed = max(self._missed, _ONCE_BITTEN * missed)
        else:
            self._ceiling = max(1.0, proven)
            self._limit = min(self._limit, math.floor(self._ceiling))
            if another:
                often = now < self._refused_at + _RARELY * self._hold
                longer = 2 * self._hold if often else self._hold / 2
                self._hold = min(_LONGEST_HOLD, max(_SHORTEST_HOLD, longer))
                self._grow_from = now + self._hold
        if another:
            self._refused_at = now
            self._closed_until = now + jittered_backoff(1)

    def _room(self, now: float) -> int:
        if now < self._closed_until:
            return 0
        free, posts = self._limit - self.running, self._most_posting
        if free <= 0 and self._watched:
            self._estimate.refresh(self._watched.values(), now, self._way)
            margin = max(_CAUTION * self._estimate.deviation, self._missed)
            likely = self._estimate.mean + margin
            free += max(0, len(self._watched) - math.ceil(likely))
            posts = min(posts, _UNSURE_POSTS)
        return min(free, posts - self._posting)

    def _proven(self) -> float:
        """Tasks that run at the service, for all we know."""
        return len(self._unwatched) + min(len(self._watched), self._estimate.mean)

    def _until_it_may_open(self, now: float) -> float:
        """Seconds after which there may be room without anybody saying so."""
        if now < self._closed_until:
            return self._closed_until - now
        if self._estimate.mean < len(self._watched):
            return _LOOK_AGAIN
        if self._unwatched:
            return next(iter(self._unwatched.values())) - now
        return _ASSUMED_RUNNING

    def _forget_ended(self, now: float) -> None:
        while self._unwatched:
            task_id, ends = next(iter(self._unwatched.items()))
            if ends > now:
                break
            del self._unwatched[task_id]

    def _wake(self, now: float) -> None:
        """Wake as many as there is room for, and at least the first to set its alarm anew."""
        with self._lock:
            if not self._queue:
                return
            number = min(max(1, self._room(now)), len(self._queue))
            chosen = [self._queue.popitem(last=False)[1] for _ in range(number)]
        for woken, loop in chosen:
            try:
                wake(woken, loop)
            except RuntimeError:  # the waiter's loop is closed already: on to the next
                self._wake(now)
