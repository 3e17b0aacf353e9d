"""The request limit from our side: so many in any sliding minute, evenly spaced."""

from __future__ import annotations

import asyncio
import math
import threading

_HEADROOM = 0.98
"""Share of the limit we use: requests bunch a little on their way to the service."""

_RECOVERY = 120.0
"""Seconds in which a request rate that was halved grows e-fold again."""


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
