"""One API key's account: its two limits and its money."""

from __future__ import annotations

import heapq
import math
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefect_flux_kontext.sandbox.tasks import Task

_MINUTE = 60.0


class RequestWindow:
    """Counts requests in an exact sliding window of 60 s.

    Attributes:
        peak: Most requests that ever were inside one window.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._stamps: deque[float] = deque()
        self.peak = 0

    def wait(self, now: float) -> float:
        """Seconds until there is room for a request; 0 when there is."""
        while self._stamps and self._stamps[0] <= now - _MINUTE:
            self._stamps.popleft()
        if len(self._stamps) < self._limit:
            return 0.0
        return self._stamps[0] - (now - _MINUTE)  # as above, or rounding lets one in

    def count(self, now: float) -> None:
        """Takes one request in."""
        self._stamps.append(now)
        self.peak = max(self.peak, len(self._stamps))


class RunningTasks:
    """Knows which tasks hold a slot, without a timer for each.

    Attributes:
        peak: Most tasks that ever ran at once.
    """

    def __init__(self) -> None:
        self._by_end: list[tuple[float, str, Task]] = []
        self._waiting_for_reference: set[Task] = set()
        self.peak = 0

    def count(self, now: float) -> int:
        """How many run at a loop time."""
        while self._by_end and self._by_end[0][0] <= now:
            task = heapq.heappop(self._by_end)[2]
            if task.references_at is None:
                self._waiting_for_reference.add(task)
        return len(self._by_end) + len(self._waiting_for_reference)

    def add(self, task: Task) -> None:
        """Gives a slot to a task that was accepted right now."""
        heapq.heappush(self._by_end, (task.ready_at, task.task_id, task))
        self.peak = max(self.peak, self.count(task.accepted_at))

    def references_seen(self, task: Task) -> None:
        """Frees the slot of a task that only waited for its reference."""
        self._waiting_for_reference.discard(task)


class Account:
    """What the sandbox keeps for one API key.

    Args:
        balance: Micro-dollars to start with.
        requests_per_minute: Submits and status requests in any 60 s.
    """

    def __init__(self, balance: int, requests_per_minute: int) -> None:
        self.balance = balance
        self.window = RequestWindow(requests_per_minute)
        self.running = RunningTasks()


def retry_after(seconds: float) -> int:
    """A `Retry-After` header after which the request is sure to fit."""
    return max(1, math.ceil(seconds))
