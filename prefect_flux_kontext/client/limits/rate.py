"""Client-side request limit: a maximum per sliding minute, evenly spaced."""

from __future__ import annotations

import asyncio
import math
import threading
from collections import OrderedDict, deque

from prefect_flux_kontext.client.limits.learned_limit import LearnedLimit
from prefect_flux_kontext.client.limits.waiters import Waiter

# Requests bunch up on their way to the service, so the limit is kept in a longer window.
_WINDOW_SECONDS = 61.2

# Requests that may be sent at once, as a share of the limit, and at least.
_BURST_SHARE = 0.02
_MIN_BURST = 2

# A lowered limit grows by this with each answer: by a factor of e in two minutes.
_GROWTH_PER_ANSWER = 0.5

# A waiter that is not the first checks at this interval whether those before it still exist.
_QUEUE_CHECK_SECONDS = 60.0


class RateLimiter:
    """Allows at most `per_minute` requests in any 60 seconds, or fewer if the service does.

    It is a generic cell rate algorithm: requests are evenly spaced after a small burst. With a
    burst of b and a spacing of i seconds, no window of w seconds contains more than b + w / i
    requests; i is chosen so that this is the limit. Only submits may use the burst, and they go
    first, because each of them holds a slot at the service that is idle until the submit is sent.
    So a poll leaves room for the submit that follows if it finds that the task has ended.

    One limiter serves several threads and event loops.
    """

    def __init__(self, per_minute: int) -> None:
        self._limit = LearnedLimit(per_minute)
        self._answered: deque[float] = deque()  # loop times of the last minute
        self._next = -math.inf
        self._paused_until = -math.inf
        self._submits: OrderedDict[Waiter, None] = OrderedDict()
        self._others: OrderedDict[Waiter, None] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def spacing(self) -> float:
        """Current number of seconds between two requests."""
        limit = self._limit.value
        return _WINDOW_SECONDS / (limit - _burst_of(limit) + 1)

    async def acquire(self, *, has_priority: bool = False) -> None:
        """Wait until one more request may be sent, with priority before those without."""
        loop = asyncio.get_running_loop()
        with self._lock:
            now = loop.time()
            is_first = not self._submits and (has_priority or not self._others)
            if is_first and self._seconds_until_next(now, has_priority) <= 0:
                self._count_request(now)
                return
            waiter, queue = Waiter(), self._submits if has_priority else self._others
            queue[waiter] = None
        try:
            while True:
                with self._lock:
                    now = loop.time()
                    is_first = self._first_in_line() is waiter
                    seconds = (
                        self._seconds_until_next(now, has_priority)
                        if is_first
                        else _QUEUE_CHECK_SECONDS
                    )
                    if seconds <= 0:
                        self._count_request(now)
                        return
                    waiter.prepare()
                await waiter.sleep(seconds)
        finally:
            with self._lock:
                queue.pop(waiter, None)
                if first := self._first_in_line():
                    first.wake()

    def pause(self, seconds: float) -> None:
        """Allow no request for this many seconds, and no burst after them."""
        now = asyncio.get_running_loop().time()
        with self._lock:
            self._paused_until = max(self._paused_until, now + seconds)
            self._next = max(self._next, self._paused_until + self._tolerance)

    def resize(self, per_minute: int) -> None:
        """Change the limit."""
        with self._lock:
            before = self._tolerance
            self._limit.reconfigure(per_minute)
            self._delay_burst(before)

    def record_answer(self) -> None:
        """Count a request that the service did not reject."""
        now = asyncio.get_running_loop().time()
        with self._lock:
            self._answered.append(now)
            self._drop_answered(now)
            self._limit.grow(_GROWTH_PER_ANSWER, now)

    def meet_limit(self, *, sent_at: float) -> None:
        """Lower the limit to the requests of the last minute, because more were rejected."""
        now = asyncio.get_running_loop().time()
        with self._lock:
            self._drop_answered(now)
            if self._answered:  # otherwise nothing is known
                before = self._tolerance
                self._limit.meet(len(self._answered), now, sent_at=sent_at)
                self._delay_burst(before)

    def is_at_limit(self) -> bool:
        """Return whether a limit was met, by about as many requests as in the last minute."""
        return self._limit.is_near(len(self._answered))

    def _drop_answered(self, now: float) -> None:
        while self._answered and self._answered[0] <= now - 60:
            self._answered.popleft()

    @property
    def _tolerance(self) -> float:
        return (_burst_of(self._limit.value) - 1) * self.spacing

    def _delay_burst(self, tolerance_before: float) -> None:
        # Fewer requests have a wider burst in seconds, which must not begin earlier.
        self._next += max(0.0, self._tolerance - tolerance_before)

    def _seconds_until_next(self, now: float, has_priority: bool) -> float:
        earliest = self._next - self._tolerance if has_priority else self._next
        return max(earliest, self._paused_until) - now

    def _count_request(self, now: float) -> None:
        self._next = max(self._next, now) + self.spacing

    def _first_in_line(self) -> Waiter | None:
        for queue in (self._submits, self._others):
            while queue:
                waiter = next(iter(queue))
                if not waiter.is_stranded:
                    return waiter
                del queue[waiter]
        return None


def _burst_of(limit: int) -> int:
    return min(limit, max(_MIN_BURST, int(_BURST_SHARE * limit)))
