"""When to ask the service how a task is doing."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from prefect_flux_kontext.client.limits.poll_scheduler import PollScheduler
from prefect_flux_kontext.client.retry import jittered_backoff
from prefect_flux_kontext.errors import (
    ApiError,
    GenerationFailedError,
    GenerationTimeoutError,
    NotFoundError,
)
from prefect_flux_kontext.models import GenerationResult

if TYPE_CHECKING:
    from prefect_flux_kontext.client.client import FluxKontextClient
    from prefect_flux_kontext.models import GenerationTask, TaskStatus


class PollingCadence(BaseModel):
    """How long to wait before the first look, between looks, and in all.

    The defaults for the first two are the service's own advice: generation takes about 30 s,
    so wait 20 s, then ask every 3 s.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    initial_delay: float = Field(
        default=20.0, ge=0, description="Seconds from submit to the first look."
    )
    interval: float = Field(default=3.0, gt=0, description="Seconds between further looks.")
    timeout: float = Field(
        default=900.0, gt=0, description="Seconds to wait in all, by the clock."
    )

    @model_validator(mode="after")
    def _there_is_a_first_look(self) -> Self:
        if self.timeout <= self.initial_delay:
            raise ValueError("timeout must be longer than initial_delay, or nothing is ever asked")
        return self


logger = logging.getLogger(__name__)

_UNKNOWN_AT_FIRST = 60.0
"""Seconds for which a new task may still be unknown to the service that accepted it."""


class Pauses(Protocol):
    """The pauses of one wait; who knows when the task ends may cut them short."""

    async def before_first_look(self, age: float) -> None:
        """Wait before the first look at a task that was submitted `age` seconds ago."""

    async def before_next_look(self) -> None:
        """Wait after a look that found the task still running."""


async def wait_until_ended(
    client: FluxKontextClient,
    task: GenerationTask,
    cadence: PollingCadence,
    pauses: Pauses | None = None,
) -> GenerationResult:
    """Wait for a task to end, holding no thread.

    The first look comes `cadence.initial_delay` seconds after the submit, further ones every
    `cadence.interval`. A status request that fails in a way that may pass (5xx, a lost or
    unreadable reply) is asked again with growing pauses.

    Args:
        client: The service.
        task: What to wait for.
        cadence: When to look, and when to give up.
        pauses: Other pauses between looks than those that the cadence and what was learned of
            the task's mode ask for.

    Returns:
        The result, with at least one URL.

    Raises:
        GenerationFailedError: The service gave up on the task.
        GenerationTimeoutError: It did not end within `cadence.timeout` seconds. It is paid
            for all the same: wait again for the same task id later.
        RefusedError: The service refuses to tell (4xx).
    """
    troubles: list[ApiError] = []
    looks = PollScheduler(client.governor, task, cadence, called=pauses is not None)
    try:
        async with asyncio.timeout(cadence.timeout):
            status = await _last_status(client, task, cadence, looks, troubles, pauses)
    except TimeoutError:
        timed_out = True
    else:
        timed_out = False
    finally:
        looks.over()
    if timed_out:
        raise GenerationTimeoutError(
            f"Task {task.task_id} did not end within {cadence.timeout:g} s"
            f"{f', and the last answer was {troubles[-1]}' if troubles else ''}. It is paid for "
            "and may still end: wait for the same task id again, which costs nothing.",
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


async def _last_status(
    client: FluxKontextClient,
    task: GenerationTask,
    cadence: PollingCadence,
    looks: PollScheduler,
    troubles: list[ApiError],
    pauses: Pauses | None,
) -> TaskStatus:
    """Ask until it has ended; `troubles` holds what went wrong since the last good answer."""
    if pauses is None:
        for _ in range(2):  # more may be known after the first pause
            await asyncio.sleep(looks.pause())
    else:
        await pauses.before_first_look(looks.age)
    while True:
        try:
            status = await client.status(task.task_id)
        except ApiError as error:
            unknown_yet = isinstance(error, NotFoundError) and looks.age < _UNKNOWN_AT_FIRST
            if not (error.retryable or unknown_yet):
                raise
            troubles.append(error)
            logger.debug("Task %s: asking again after %s", task.task_id, error)
            await asyncio.sleep(max(cadence.interval, jittered_backoff(len(troubles))))
        else:
            looks.looked(status)
            if status.state in ("success", "failed"):
                return status
            troubles.clear()
            if pauses is None:
                await asyncio.sleep(looks.pause())
            else:
                await pauses.before_next_look()
