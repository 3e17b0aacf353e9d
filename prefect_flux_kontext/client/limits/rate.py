"""Client-side request limit: a maximum per sliding minute, evenly spaced."""

from __future__ import annotations

import asyncio
import math
import threading
from collections import OrderedDict

from prefect_flux_kontext.client.limits.waiters import Waiter

# Share of the limit that is used, because requests bunch up a little on their way to the service.
_USED_SHARE_OF_LIMIT = 0.98

# Seconds in which a request rate that was halved grows by a factor of e.
_RECOVERY_SECONDS = 120.0

# Requests are at least one a minute, however often the rate was halved.
_MAX_SPACING_SECONDS = 60.0

# A waiter that is not the first checks at this interval whether those before it still exist.
_QUEUE_CHECK_SECONDS = 60.0


class RateLimiter:
    """Allows at most `per_minute` requests in any 60 seconds.

    It is a generic cell rate algorithm: requests are evenly spaced after a small burst. With a
    burst of b and a spacing of i seconds, no window of 60 s contains more than b - 1 + 60 / i
    requests; i is chosen so that this is the limit. Waiting submits go first, because each of
    them holds a slot at the service that is idle until the submit is sent.

    One limiter serves several threads and event loops.
    """

    def __init__(self, per_minute: int) -> None:
        usable = max(1, math.floor(per_minute * _USED_SHARE_OF_LIMIT))
        burst = max(1, usable // 50)
        self._min_spacing = self._spacing = 60.0 / (usable - burst + 1)
        self._max_tolerance = self._tolerance = (burst - 1) * self._spacing
        self._next = -math.inf
        self._paused_until = -math.inf
        self._submits: OrderedDict[Waiter, None] = OrderedDict()
        self._others: OrderedDict[Waiter, None] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def spacing(self) -> float:
        """Current number of seconds between two requests."""
        return self._spacing

    async def acquire(self, *, has_priority: bool = False) -> None:
        """Wait until one more request may be sent, with priority before those without."""
        loop = asyncio.get_running_loop()
        with self._lock:
            now = loop.time()
            is_first = not self._submits and (has_priority or not self._others)
            if is_first and self._seconds_until_next(now) <= 0:
                self._count_request(now)
                return
            waiter, queue = Waiter(), self._submits if has_priority else self._others
            queue[waiter] = None
        try:
            while True:
                with self._lock:
                    now = loop.time()
                    is_first = self._first_in_line() is waiter
                    seconds = self._seconds_until_next(now) if is_first else _QUEUE_CHECK_SECONDS
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

    def slow_down(self) -> None:
        """Halve the rate: the account's limit is lower than configured, or is shared."""
        with self._lock:
            self._spacing = min(_MAX_SPACING_SECONDS, 2 * self._spacing)
            self._tolerance = 0.0

    def speed_up(self) -> None:
        """Let a halved rate recover a little, at a pace that does not depend on the rate.

        Call it once for each request that was answered.
        """
        with self._lock:
            if self._spacing > self._min_spacing:
                smaller = self._spacing * (1 - self._spacing / _RECOVERY_SECONDS)
                self._spacing = max(self._min_spacing, smaller)
            else:
                self._tolerance = self._max_tolerance

    def _seconds_until_next(self, now: float) -> float:
        return max(self._next - self._tolerance, self._paused_until) - now

    def _count_request(self, now: float) -> None:
        self._next = max(self._next, now) + self._spacing

    def _first_in_line(self) -> Waiter | None:
        for queue in (self._submits, self._others):
            while queue:
                waiter = next(iter(queue))
                if not waiter.is_stranded:
                    return waiter
                del queue[waiter]
        return None
