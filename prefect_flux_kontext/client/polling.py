"""Polling: the cadence of status requests, and the wait for a task to end."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from prefect_flux_kontext.client.limits.poll_scheduler import PollScheduler
from prefect_flux_kontext.client.retry import jittered_backoff
from prefect_flux_kontext.errors import (
    ApiError,
    GenerationFailedError,
    GenerationTimeoutError,
    InsufficientBalanceError,
    NotFoundError,
    UnauthorizedError,
)
from prefect_flux_kontext.models import GenerationResult, GenerationTask, TaskStatus
from prefect_flux_kontext.telemetry import trace

if TYPE_CHECKING:
    from prefect_flux_kontext.client.client import FluxKontextClient

__all__ = ["PollPauses", "PollingCadence", "wait_until_ended"]

logger = logging.getLogger(__name__)

# For this long, the service may answer 404 for a task that it has just accepted.
_UNKNOWN_TASK_GRACE_SECONDS = 60.0

# A 404 lasts after this many in a row.
_MAX_NOT_FOUND = 3


class PollingCadence(BaseModel):
    """When to request a task's status, and how long to wait in total.

    The defaults of `initial_delay` and `interval` follow the service's advice: a generation
    takes about 30 s, so wait 20 s, then poll every 3 s.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    initial_delay: float = Field(default=20.0, ge=0)
    """Seconds from the submit to the first status request."""
    interval: float = Field(default=3.0, gt=0)
    """Seconds between later status requests."""
    timeout: float = Field(default=900.0, gt=0)
    """Seconds to wait in total."""

    @model_validator(mode="after")
    def _validate_timeout(self) -> Self:
        if self.timeout <= self.initial_delay:
            raise ValueError(
                "timeout must be longer than initial_delay, otherwise the task is never polled"
            )
        return self


class PollPauses(Protocol):
    """The pauses of one wait. A callback that announces the task's end may shorten them."""

    async def before_first_poll(self, age: float) -> None:
        """Wait before the first status request for a task submitted `age` seconds ago."""

    async def before_next_poll(self) -> None:
        """Wait after a status request that found the task still running."""


@trace("wait")
async def wait_until_ended(
    client: FluxKontextClient,
    task: GenerationTask,
    cadence: PollingCadence,
    pauses: PollPauses | None = None,
) -> GenerationResult:
    """Wait for a task to end, without holding a thread.

    The first status request is sent `cadence.initial_delay` seconds after the submit, later
    ones every `cadence.interval` seconds, until enough is known about the duration of the mode's
    tasks to choose better times. The task is paid for, so a status request that fails is repeated
    with growing pauses. Only 401, 402 and a lasting 404 end the wait. Given `pauses` replace those
    that follow from the cadence. The result has at least one URL.

    Raises:
        GenerationFailedError: The service reports that the task failed.
        GenerationTimeoutError: The task did not end within `cadence.timeout` seconds. It is
            paid for; wait for the same task id again later.
        UnauthorizedError: The service refuses the key (401).
        InsufficientBalanceError: The service answers 402.
        NotFoundError: The service does not know the task (404), more than a minute after its
            submit and three times in a row.
    """
    seen = _LastReplies()
    scheduler = PollScheduler(client.limiter, task, cadence, has_callback=pauses is not None)
    try:
        async with asyncio.timeout(cadence.timeout):
            status = await _poll_until_ended(client, task, cadence, scheduler, seen, pauses)
    except TimeoutError:
        is_timed_out = True
    else:
        is_timed_out = False
    finally:
        scheduler.close()
    if is_timed_out:  # raised outside of the handler, without the TimeoutError as its context
        raise GenerationTimeoutError(
            f"Task {task.task_id} did not end within {cadence.timeout:g} s{seen}. It is paid for "
            "and may still end. Waiting for the same task id again costs nothing.",
            task_id=task.task_id,
        )
    if status.state == "failed":
        raise GenerationFailedError(
            f"Task {task.task_id} failed: {status.fail_code or 'no fail code'}: "
            f"{status.fail_message or 'no message'}",
            task_id=task.task_id,
            code=status.fail_code,
        )
    return GenerationResult(
        task_id=task.task_id,
        result_urls=status.result_urls,
        request=task.request,
        submitted_at=task.submitted_at,
        completed_at=status.completed_at,
        generation_seconds=status.generation_seconds,
        base_url=client.base_url,
    )


@dataclass
class _LastReplies:
    """The last state of a task, and the errors since."""

    state: str | None = None
    errors: list[ApiError] = field(default_factory=list)

    def __str__(self) -> str:
        known = [f"last state: {self.state}"] if self.state else []
        known += [f"last error: {self.errors[-1]}"] if self.errors else []
        return f" ({'; '.join(known)})" if known else ""

    @property
    def is_final(self) -> bool:
        """Whether the last errors leave no hope for another request."""
        last = self.errors[-_MAX_NOT_FOUND:]
        return isinstance(last[-1], UnauthorizedError | InsufficientBalanceError) or (
            len(last) == _MAX_NOT_FOUND and all(isinstance(each, NotFoundError) for each in last)
        )


async def _poll_until_ended(
    client: FluxKontextClient,
    task: GenerationTask,
    cadence: PollingCadence,
    scheduler: PollScheduler,
    seen: _LastReplies,
    pauses: PollPauses | None,
) -> TaskStatus:
    """Return the first status that says that the task has ended."""
    if pauses is None:
        await asyncio.sleep(scheduler.pause())
    else:
        await pauses.before_first_poll(scheduler.age)
    while True:
        try:
            status = await client.status(task.task_id)
        except ApiError as error:
            seen.errors.append(error)
            may_be_new = (
                isinstance(error, NotFoundError) and scheduler.age < _UNKNOWN_TASK_GRACE_SECONDS
            )
            if seen.is_final and not may_be_new:
                raise
            logger.debug("Task %s: retrying the status request: %s", task.task_id, error)
            await asyncio.sleep(max(cadence.interval, jittered_backoff(len(seen.errors))))
        else:
            scheduler.record_poll(status)
            if status.has_ended:
                return status
            seen.state = status.state
            seen.errors.clear()
            if pauses is None:
                await asyncio.sleep(scheduler.pause())
            else:
                await pauses.before_next_poll()
