"""Background work on accepted tasks: checks of references, and callbacks."""

from __future__ import annotations

import asyncio
import json
import random
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

import httpx

from prefect_flux_kontext.sandbox.contract import JsonObject, success
from prefect_flux_kontext.sandbox.references import References, outbound_client

if TYPE_CHECKING:
    from prefect_flux_kontext.sandbox.faults.plan import ActiveFaults
    from prefect_flux_kontext.sandbox.service import Service, Task

_REDELIVERY_DELAYS_SECONDS = (5.0, 15.0, 60.0)
# A loop may wake a sleeper this much too early.
_CLOCK_RESOLUTION_SECONDS = 0.001
_CONNECTIONS = 1_000

_FORGED_ENVELOPE = success(
    {
        "taskId": "task_ffffffffffffffff",
        "state": "success",
        "resultJson": json.dumps({"resultUrls": ["file:///etc/hostname"]}),
    }
)


class CallbackSender:
    """Posts envelopes to callback URLs, up to four times, until the receiver answers 200."""

    def __init__(self, timeout: float, delay_scale: float) -> None:
        self._timeout = timeout
        self._delays = [delay * delay_scale for delay in _REDELIVERY_DELAYS_SECONDS]
        self._client = outbound_client(_CONNECTIONS)

    async def deliver(self, url: str, envelope: JsonObject) -> bool:
        """Post the envelope until the receiver accepts it; return whether it did."""
        for delay in self._delays:
            if await self._post(url, envelope):
                return True
            await asyncio.sleep(delay)
        return await self._post(url, envelope)

    async def _post(self, url: str, envelope: JsonObject) -> bool:
        try:
            async with (
                asyncio.timeout(self._timeout),
                self._client.stream("POST", url, json=envelope) as response,
            ):
                # Only the status counts; the body is not read.
                return response.status_code == HTTPStatus.OK
        except (TimeoutError, httpx.HTTPError, httpx.InvalidURL, ValueError):
            return False


class Lifecycle:
    """Checks references of tasks and delivers their callbacks in the background.

    A task that needs neither has no background job: its state follows from the clock.
    """

    def __init__(
        self,
        service: Service,
        references: References,
        sender: CallbackSender,
        faults: ActiveFaults,
    ) -> None:
        self._service = service
        self._references = references
        self._callback_sender = sender
        self._faults = faults
        self._jobs: set[asyncio.Task[None]] = set()

    def start(self, task: Task) -> None:
        """Start the background job of an accepted task, if it needs one."""
        if task.references_at is None and self._references.are_cached(task.input.image_urls):
            self._service.references_seen(task, None)
        if task.references_at is None or task.submission.request_type == "callback":
            job = asyncio.get_running_loop().create_task(self._process(task))
            self._jobs.add(job)
            job.add_done_callback(self._jobs.discard)

    def stop(self) -> None:
        """Cancel all background jobs."""
        for job in self._jobs:
            job.cancel()

    async def _process(self, task: Task) -> None:
        if task.references_at is None:
            error = await self._references.check(task.input.image_urls, task.base_url)
            self._service.references_seen(task, error)
        submission = task.submission
        if submission.request_type == "callback" and submission.callback_url:
            remaining = max(0.0, task.ready_at - self._service.now())
            await asyncio.sleep(remaining + _CLOCK_RESOLUTION_SECONDS)
            if self._faults.task_fault(task.task_id) == "never-ends":
                return
            envelope = success(task.status(self._service.now(), self._service.epoch))
            delivered = await self._deliver(submission.callback_url, envelope)
            self._service.callback_ended(delivered=delivered)

    async def _deliver(self, url: str, envelope: JsonObject) -> bool:
        """Deliver a callback under the active faults; return whether it arrived."""
        arrived = False
        fault, _ = self._faults.applies("callback")
        match fault:
            case "lost":
                return False
            case "doubled":
                arrived = await self._callback_sender.deliver(url, envelope)
            case "late":
                await asyncio.sleep(self._faults.plan.late)
            case "overtaken":
                # Seeded with the URL, which no other callback has.
                await asyncio.sleep(random.Random(url).uniform(0, self._faults.plan.late))
            case "forged":
                await self._callback_sender.deliver(url, _FORGED_ENVELOPE)
            case "misdirected":
                where = urlsplit(url)
                guessed = where.path.rpartition("/")[0] + "/guessed"
                await self._callback_sender.deliver(
                    urlunsplit(where._replace(path=guessed)), _FORGED_ENVELOPE
                )
        return await self._callback_sender.deliver(url, envelope) or arrived
