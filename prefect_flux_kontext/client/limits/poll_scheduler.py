"""Scheduling of status requests: poll a task when it has likely ended."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from prefect_flux_kontext.models import utc_now

if TYPE_CHECKING:
    from prefect_flux_kontext.client.limits.account import AccountLimiter
    from prefect_flux_kontext.client.polling import PollingCadence
    from prefect_flux_kontext.models import GenerationTask, TaskStatus

# A poll is due when the expected time for which the task has been over unnoticed reaches this
# share of a round: the time in which each running task could be polled once if all requests were
# polls, 6 s at the account's limits. Few tasks are then polled at every interval, and many when
# they have likely ended. A larger share needs fewer requests; a smaller one lets polls queue.
_UNNOTICED_ROUNDS = 0.09

# The least such time, in intervals: no poll is sent at ages at which tasks hardly ever end.
_MIN_UNNOTICED_INTERVALS = 0.05

# Longest pause between polls, as a share of the task's age: slow tasks are not forgotten.
_MAX_PAUSE_SHARE_OF_AGE = 1 / 3


class PollScheduler:
    """Schedules the polls of one task, and teaches the latency model what they show.

    Until enough tasks of the mode have ended, polls follow the configured cadence. From then on,
    each task is polled at every interval once its end is likely, and more rarely if requests are
    scarce. The interval stays the shortest time between two polls.
    The first poll may come before `initial_delay` if tasks are known to end sooner, and later if
    that was learned during the first pause.

    A scheduler marks its task as watched. Call `close` when the wait is over. With `has_callback`,
    a callback announces the end of the task.
    """

    def __init__(
        self,
        limiter: AccountLimiter,
        task: GenerationTask,
        cadence: PollingCadence,
        *,
        has_callback: bool = False,
    ) -> None:
        self._requests = limiter.requests
        self._slots = limiter.tasks
        self._task_id = task.task_id
        self._cadence = cadence
        self._has_callback = has_callback
        self._model = limiter.latency_model(task.request.mode if task.request else "unknown")
        self._loop = asyncio.get_running_loop()
        age = max(0.0, (utc_now() - task.submitted_at).total_seconds())
        self._submitted_at = self._loop.time() - age
        self._deadline = self._loop.time() + cadence.timeout
        self._last_running_age = 0.0  # age at which a poll last found the task running
        self._slots.watch(task.task_id, model=self._model, age=age)

    @property
    def age(self) -> float:
        """Seconds since the task was submitted."""
        return self._loop.time() - self._submitted_at

    def pause(self) -> float:
        """Return the seconds to wait before the next poll."""
        cadence, age = self._cadence, self.age
        was_polled = bool(self._last_running_age)
        # The interval is counted from one request to the next.
        shortest = max(0.0, cadence.interval - self._slots.round_trip)
        if not was_polled:
            shortest = max(0.0, min(cadence.interval, cadence.initial_delay) - age)
        if not self._model.is_known:
            return cadence.interval if was_polled else max(0.0, cadence.initial_delay - age)
        round_seconds = self._slots.running * self._requests.spacing
        unnoticed = max(
            _UNNOTICED_ROUNDS * round_seconds, _MIN_UNNOTICED_INTERVALS * cadence.interval
        )
        due_at_age = self._last_running_age + self._model.time_to_poll(
            self._last_running_age, unnoticed
        )
        # The task started half a round trip before its submit was answered, and a poll takes
        # half of one to arrive.
        pause = due_at_age - age - self._slots.round_trip
        if was_polled:
            pause = min(pause, _MAX_PAUSE_SHARE_OF_AGE * age)
        # Send the last poll an interval before the deadline.
        left = self._deadline - self._loop.time() - cadence.interval
        return max(shortest, min(pause, left))

    def record_poll(self, status: TaskStatus) -> None:
        """Record a status that was received just now."""
        age = max(self.age, self._last_running_age)
        if status.state not in ("success", "failed"):
            self._model.record_running(self._last_running_age, age)
            self._last_running_age = age
            self._slots.record_running(self._task_id, age)
            return
        if self._has_callback and not self._last_running_age:
            # Running tasks send no callback, so these tasks alone would make the model too short.
            return
        seconds = status.generation_seconds
        if status.created_at and status.completed_at:
            seconds = (status.completed_at - status.created_at).total_seconds()
        if seconds is None:
            seconds = (self._last_running_age + age) / 2
        ended_at_age = min(max(seconds, self._last_running_age), age)
        self._model.record_end(self._last_running_age, ended_at_age)

    def close(self) -> None:
        """End the wait and free the task's slot."""
        self._slots.release_task(self._task_id)
