"""The request limit from our side: so many in any sliding minute, evenly spaced."""

from __future__ import annotations

import asyncio
import math
import threading
from collections import OrderedDict
from typing import TypeAlias

from prefect_flux_kontext.client.limits.waiters import finish, wake

_HEADROOM = 0.98
"""Share of the limit we use: requests bunch a little on their way to the service."""

_RECOVERY = 120.0
"""Seconds in which a request rate that was halved grows e-fold again."""

_LOOK_AGAIN = 60.0
"""Seconds after which one who waits looks whether those before are still there."""

_Queue: TypeAlias = "OrderedDict[object, tuple[asyncio.Future[None], asyncio.AbstractEventLoop]]"


class RateLimiter:
    """At most `per_minute` requests in any sliding minute, after a small burst evenly spaced.

    A generic cell rate: with a burst of b and a spacing of i seconds, no window of 60 s holds
    more than b - 1 + 60 / i requests, so i is chosen to make that the limit. Of those that wait,
    submits go first: each has a slot at the service that idles until it is sent.
    """

    def __init__(self, per_minute: int) -> None:
        usable = max(1, math.floor(per_minute * _HEADROOM))
        burst = max(1, usable // 50)
        self._closest = self._spacing = 60.0 / (usable - burst + 1)
        self._burst = self._tolerance = (burst - 1) * self._spacing
        self._next = -math.inf
        self._paused_until = -math.inf
        self._submits: _Queue = OrderedDict()
        self._others: _Queue = OrderedDict()
        self._lock = threading.Lock()

    @property
    def spacing(self) -> float:
        """Seconds between two requests, as things stand."""
        return self._spacing

    async def take(self, *, first: bool = False) -> None:
        """Wait until one more request may be sent.

        Args:
            first: Whether it goes before those that are not `first`.
        """
        loop = asyncio.get_running_loop()
        with self._lock:
            now = loop.time()
            if not self._submits and (first or not self._others) and self._wait(now) <= 0:
                self._send(now)
                return
            place, queue = object(), self._submits if first else self._others
            queue[place] = (loop.create_future(), loop)
        try:
            while True:
                with self._lock:
                    now = loop.time()
                    seconds = self._wait(now) if self._first_in_line() is place else _LOOK_AGAIN
                    if seconds <= 0:
                        self._send(now)
                        return
                    woken: asyncio.Future[None] = loop.create_future()
                    queue[place] = (woken, loop)
                alarm = loop.call_later(seconds, finish, woken)
                try:
                    await woken
                finally:
                    alarm.cancel()
        finally:
            with self._lock:
                queue.pop(place, None)
                self._call_the_next()

    def pause(self, seconds: float) -> None:
        """Let nobody through for so many seconds, and no burst after it."""
        now = asyncio.get_running_loop().time()
        with self._lock:
            self._paused_until = max(self._paused_until, now + seconds)
            self._next = max(self._next, self._paused_until + self._tolerance)

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

    def _wait(self, now: float) -> float:
        """Seconds until the next request may be sent, seen from now."""
        return max(self._next - self._tolerance, self._paused_until) - now

    def _send(self, now: float) -> None:
        self._next = max(self._next, now) + self._spacing

    def _first_in_line(self) -> object:
        for queue in (self._submits, self._others):
            while queue:
                place, (_, loop) = next(iter(queue.items()))
                if not loop.is_closed():
                    return place
                del queue[place]
        return None

    def _call_the_next(self) -> None:
        place = self._first_in_line()
        if place is None:
            return
        woken, loop = (self._submits if place in self._submits else self._others)[place]
        wake(woken, loop)
