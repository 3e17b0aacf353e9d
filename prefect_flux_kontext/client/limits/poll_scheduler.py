"""When to look at a task next: when it has likely ended, by what its kind took lately."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from prefect_flux_kontext.models import utc_now

if TYPE_CHECKING:
    from prefect_flux_kontext.client.limits.account import AccountLimiter
    from prefect_flux_kontext.client.polling import PollingCadence
    from prefect_flux_kontext.models import GenerationTask, TaskStatus

_ENOUGH = 20
"""Tasks that must have ended before the configured cadence gives way to what was learned."""

_LEAST = 0.7
"""Intervals that an ended task may be expected to have gone unnoticed when it is looked at."""

_PRICE = 0.39
"""The same where requests are scarce, in rounds: the time in which all tasks that run could be
asked once, were all requests looks. A round takes 6 to 7 s at the account's limits."""

_LONGEST = 1 / 3
"""Longest pause between looks, as a share of the task's age: stragglers are not forgotten."""


class PollScheduler:
    """The looks at one task, and what they teach about others of its mode.

    Until enough tasks have ended, looks come at the configured cadence. From then on the next
    look comes when the task, by now, is expected to have been over for most of an interval, or for
    longer where requests are scarce. The interval stays the shortest pause between two looks. The
    first look may come before `initial_delay` where tasks are known to end sooner, and later where
    that was learned while it was waited for.

    Args:
        governor: The account's; it keeps what was learned.
        task: The task, from now on watched.
        cadence: What was configured.
        called: Whether the service tells when the task has ended.
    """

    def __init__(
        self,
        governor: AccountLimiter,
        task: GenerationTask,
        cadence: PollingCadence,
        *,
        called: bool = False,
    ) -> None:
        self._governor = governor
        self._gate = governor.tasks
        self._task_id = task.task_id
        self._cadence = cadence
        self._called = called
        self._curve = governor.curve(task.request.mode if task.request else "unknown")
        self._loop = asyncio.get_running_loop()
        age = max(0.0, (utc_now() - task.submitted_at).total_seconds())
        self._began = self._loop.time() - age
        self._deadline = self._loop.time() + cadence.timeout
        self._runs_at = 0.0
        self._gate.watched(task.task_id, curve=self._curve, age=age)

    @property
    def age(self) -> float:
        """Seconds since the task was submitted."""
        return self._loop.time() - self._began

    def pause(self) -> float:
        """Seconds to wait before the next look."""
        cadence, age = self._cadence, self.age
        shortest = cadence.interval
        if not self._runs_at:
            shortest = max(0.0, min(cadence.interval, cadence.initial_delay) - age)
        if self._curve.known < _ENOUGH:
            return cadence.interval if self._runs_at else max(0.0, cadence.initial_delay - age)
        round_of_looks = self._gate.running * self._governor.requests.spacing
        patience = max(_LEAST * cadence.interval, _PRICE * round_of_looks)
        ripe = self._runs_at + self._curve.time_to_look(self._runs_at, patience)
        # The task had begun half a round trip before we knew, and a look takes half of one.
        pause = ripe - age - self._gate.round_trip
        if self._runs_at:
            pause = min(pause, _LONGEST * age)
        # The last look comes shortly before the deadline, not some time before it.
        left = self._deadline - self._loop.time() - cadence.interval
        return max(shortest, min(pause, left))

    def looked(self, status: TaskStatus) -> None:
        """The service has answered just now: the task had its present age, as we count it."""
        age = max(self.age, self._runs_at)
        if status.state not in ("success", "failed"):
            self._curve.still_running(self._runs_at, age)
            self._runs_at = age
            self._gate.runs(self._task_id, age)
            return
        if self._called and not self._runs_at:
            # Those that still run do not call, so by these alone all tasks would seem short.
            return
        took = status.generation_seconds
        if status.created_at and status.completed_at:
            took = (status.completed_at - status.created_at).total_seconds()
        if took is None:
            took = (self._runs_at + age) / 2
        self._curve.ended(self._runs_at, min(max(took, self._runs_at), age))

    def over(self) -> None:
        """Nobody waits for it any more."""
        self._gate.ended(self._task_id)
