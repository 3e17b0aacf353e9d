"""Client-side limit of tasks that run at the service at the same time."""

from __future__ import annotations

import asyncio
import math
import threading
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prefect_flux_kontext.client.limits.learned_limit import LearnedLimit
from prefect_flux_kontext.client.limits.waiters import Waiter
from prefect_flux_kontext.client.retry import RejectionRate

if TYPE_CHECKING:
    from collections.abc import Collection

    from prefect_flux_kontext.client.limits.latency_model import LatencyModel

# An unwatched task is assumed to hold its slot for this long: twice the mean of 30 s.
_UNWATCHED_TASK_SECONDS = 60.0

# A lowered limit grows with each accepted task while this share of it, less one, is in use.
_USED_SHARE = 0.95

# Time without submits on an estimate, after one was rejected.
_DOUBT_SECONDS = 10.0

# The estimate of running tasks must stay this many standard deviations below the limit. With 2.5
# deviations one submit in 400 is refused at 300 slots, with 3 one in 2,000.
_MARGIN_DEVIATIONS = 3.0

# Submits in flight: at first, while they count on tasks that have likely ended, and at most. If
# the limit is lower than configured, all of them are rejected.
_INITIAL_SUBMITS = 8
_MAX_SUBMITS_ON_ESTIMATE = 16
_MAX_SUBMITS = 32

# An estimate is reused for this long, and then the first waiter checks again.
_ESTIMATE_LIFETIME_SECONDS = 0.2


@dataclass(slots=True)
class WatchedTask:
    """A task that is being waited for."""

    started_at: float  # loop time at which its submit was answered
    model: LatencyModel | None = None
    last_running_age: float = 0.0  # age in seconds at which it was last seen running


class RunningEstimate:
    """Estimates how many watched tasks still run.

    The end of a task is noticed some seconds late, and until then its slot is idle. Of many
    tasks, the number that have ended is well known, though not which ones. So each task counts
    with the probability that it still runs. The deviation includes the variance of the tasks and
    the error of the latency model.
    """

    def __init__(self) -> None:
        self.mean = self.deviation = 0.0
        self._estimated_at = -math.inf

    def refresh(self, watched: Collection[WatchedTask], now: float, ahead: float) -> None:
        """Estimate for `ahead` seconds from now, unless the last estimate is recent."""
        if now < self._estimated_at + _ESTIMATE_LIFETIME_SECONDS:
            return
        self._estimated_at = now
        at = now + ahead + _ESTIMATE_LIFETIME_SECONDS / 2
        mean = variance = 0.0
        ended: defaultdict[LatencyModel, float] = defaultdict(float)
        for task in watched:  # a thousand tasks, several times a second: keep this loop fast
            if task.model is None or not task.model.is_known:
                mean += 1
                continue
            share = task.model.running_share(at - task.started_at, of=task.last_running_age)
            mean += share
            variance += share * (1 - share)
            ended[task.model] += 1 - share
        # An error of the model is the same for all of its tasks, so it adds up.
        variance += sum((model.relative_error * count) ** 2 for model, count in ended.items())
        self.mean, self.deviation = mean, math.sqrt(variance)

    def add_task(self) -> None:
        """Count one more task, which has only just started."""
        self.mean += 1


class ConcurrencyLimiter:
    """Limits the tasks that run at the service at the same time.

    A slot is acquired before the POST and belongs to the task after it. A watched task, which is
    being waited for, holds its slot until `release_task`; an unwatched task is assumed to end
    after 60 s. If the duration of tasks is known, watched tasks count with the probability that
    they still run. Rejected submits (429) lower the limit for a while.

    One limiter serves several threads and event loops.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.round_trip = 0.0  # running mean of the seconds from a request to its reply
        self._limit = LearnedLimit(slots)
        self._rejection_rate = RejectionRate()
        self._doubted_at = -math.inf
        self._submits = 0  # in flight
        self._max_submits = _INITIAL_SUBMITS
        self._estimate = RunningEstimate()
        self._watched: dict[str, WatchedTask] = {}
        self._unwatched: dict[str, float] = {}  # assumed end of each task, soonest first
        self._queue: OrderedDict[Waiter, None] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def running(self) -> int:
        """Tasks that hold a slot, including submits in flight."""
        return self._submits + len(self._watched) + len(self._unwatched)

    def resize(self, slots: int) -> None:
        """Change the limit. Tasks beyond a lower one go on."""
        with self._lock:
            if slots == self.slots:
                return
            self.slots = slots
            self._limit.reconfigure(slots)
        self._wake_waiters(asyncio.get_running_loop().time())

    def count_busy(self) -> int:
        """Return how many slots are in use, without those of tasks that have likely ended."""
        with self._lock:
            return self._count_busy(asyncio.get_running_loop().time())

    async def acquire(self) -> None:
        """Wait for a free slot and take it."""
        loop = asyncio.get_running_loop()
        waiter, has_slept = Waiter(), False
        try:
            while True:
                with self._lock:
                    now = loop.time()
                    self._drop_ended(now)
                    if self._count_free(now) > 0:
                        self._submits += 1
                        return
                    if waiter not in self._queue:
                        self._queue[waiter] = None
                        if has_slept:  # it was woken in vain
                            self._queue.move_to_end(waiter, last=False)
                    waiter.prepare()
                    is_first = next(iter(self._queue)) is waiter
                    seconds = (
                        self._seconds_until_check(now) if is_first else _UNWATCHED_TASK_SECONDS
                    )
                has_slept = True
                await waiter.sleep(seconds)
        finally:
            if has_slept:
                with self._lock:
                    self._queue.pop(waiter, None)
                # The next waiter is first now, or missed the wake-up that this one received.
                self._wake_waiters(loop.time())

    def record_acceptance(self, task_id: str, *, acquired_at: float | None = None) -> None:
        """Give the slot of an accepted POST to its task.

        A task of another run has no `acquired_at`, the loop time at which the slot was acquired.
        """
        now = asyncio.get_running_loop().time()
        with self._lock:
            self._rejection_rate.record_success()
            self._submits -= 1
            self._max_submits = min(_MAX_SUBMITS, self._max_submits + 1)
            if task_id not in self._watched:
                self._unwatched.setdefault(task_id, now + _UNWATCHED_TASK_SECONDS)
            likely_running = self._count_likely_running()
            self._limit.accept(likely_running, sent_at=acquired_at or now)
            if likely_running >= _USED_SHARE * self._limit.value - 1:
                self._limit.grow(1, now)
        self._wake_waiters(now)

    def record_rejection(self, *, acquired_at: float | None = None) -> None:
        """Free the slot of a POST that got 429, and lower the limit if a limit explains it.

        A single rejection does not lower it.
        """
        now = asyncio.get_running_loop().time()
        with self._lock:
            self._submits -= 1
            self._rejection_rate.record_rejection()
            self._estimate.refresh(self._watched.values(), now, self.round_trip)
            likely_running = self._count_likely_running()
            sent_at = now if acquired_at is None else acquired_at
            if sent_at <= self._doubted_at:
                pass  # it was in flight then, so it says nothing new
            elif self.running - self._submits > self._limit.value:
                # The estimate made room. It is wrong, or the limit: doubt the estimate first.
                self._doubted_at = now
            elif self._rejection_rate.high or (
                self._rejection_rate.elevated and self._limit.is_near(likely_running)
            ):
                self._limit.meet(likely_running, now, sent_at=sent_at)
                self._max_submits = _INITIAL_SUBMITS
        self._wake_waiters(now)

    def release(self) -> None:
        """Free the slot of a POST that was not accepted."""
        with self._lock:
            self._submits -= 1
        self._wake_waiters(asyncio.get_running_loop().time())

    def watch(self, task_id: str, *, model: LatencyModel | None = None, age: float = 0.0) -> None:
        """Mark a task as being waited for. It holds its slot until `release_task`.

        Without a model of its mode it counts as running until then. `age` is in seconds.
        """
        now = asyncio.get_running_loop().time()
        with self._lock:
            self._unwatched.pop(task_id, None)
            self._watched[task_id] = WatchedTask(now - age, model)
            self._estimate.add_task()

    def record_running(self, task_id: str, age: float) -> None:
        """Record that a task was seen running at an age in seconds."""
        with self._lock:
            if task_id in self._watched:
                self._watched[task_id].last_running_age = age

    def release_task(self, task_id: str) -> None:
        """Free the slot of a task that has ended or is no longer waited for."""
        with self._lock:
            self._watched.pop(task_id, None)
            self._unwatched.pop(task_id, None)
        self._wake_waiters(asyncio.get_running_loop().time())

    def _count_free(self, now: float) -> int:
        max_submits = self._max_submits
        if self.running >= self._limit.value:
            max_submits = min(max_submits, _MAX_SUBMITS_ON_ESTIMATE)
        return min(self._limit.value - self._count_busy(now), max_submits - self._submits)

    def _count_busy(self, now: float) -> int:
        busy = self.running
        is_full = busy >= self._limit.value
        if is_full and self._watched and now >= self._doubted_at + _DOUBT_SECONDS:
            self._estimate.refresh(self._watched.values(), now, self.round_trip)
            likely_running = self._estimate.mean + _MARGIN_DEVIATIONS * self._estimate.deviation
            busy -= max(0, len(self._watched) - math.ceil(likely_running))
        return busy

    def _count_likely_running(self) -> float:
        return len(self._unwatched) + min(len(self._watched), self._estimate.mean)

    def _seconds_until_check(self, now: float) -> float:
        """Return the seconds after which a slot may be free without a call that frees it."""
        if self._estimate.mean < len(self._watched):
            return _ESTIMATE_LIFETIME_SECONDS
        if self._unwatched:
            return next(iter(self._unwatched.values())) - now
        return _UNWATCHED_TASK_SECONDS

    def _drop_ended(self, now: float) -> None:
        """Drop unwatched tasks whose assumed end has passed."""
        while self._unwatched:
            task_id, ends_at = next(iter(self._unwatched.items()))
            if ends_at > now:
                break
            del self._unwatched[task_id]

    def _wake_waiters(self, now: float) -> None:
        """Wake a waiter for each free slot, and at least the first, which resets its timer."""
        with self._lock:
            if not self._queue:
                return
            number = min(max(1, self._count_free(now)), len(self._queue))
            waiters = [self._queue.popitem(last=False)[0] for _ in range(number)]
        for waiter in waiters:
            try:
                waiter.wake()
            except RuntimeError:  # the waiter's loop is closed: wake the next one
                self._wake_waiters(now)
