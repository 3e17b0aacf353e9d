"""What goes on behind a task after its submit was answered."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from prefect_flux_kontext.sandbox.contract import success
from prefect_flux_kontext.sandbox.faults.callbacks import deliver

if TYPE_CHECKING:
    from prefect_flux_kontext.sandbox.callbacks import CallbackSender
    from prefect_flux_kontext.sandbox.faults.injector import ActiveFaults
    from prefect_flux_kontext.sandbox.references import References
    from prefect_flux_kontext.sandbox.service import Service
    from prefect_flux_kontext.sandbox.tasks import Task

_A_HAIR = 0.001


class Lifecycle:
    """Looks at the references of tasks and delivers their callbacks, in the background.

    A task that needs neither costs nothing here: its state follows from the clock.
    """

    def __init__(
        self,
        service: Service,
        references: References,
        courier: CallbackSender,
        weather: ActiveFaults,
    ) -> None:
        self._service = service
        self._references = references
        self._courier = courier
        self._weather = weather
        self._lives: set[asyncio.Task[None]] = set()

    def begin(self, task: Task) -> None:
        """Does what is left to do for a task that was just accepted."""
        if task.references_at is None and self._references.held(task.input.image_urls):
            self._service.references_seen(task, None)
        if task.references_at is None or task.submission.request_type == "callback":
            life = asyncio.get_running_loop().create_task(self._live(task))
            self._lives.add(life)
            life.add_done_callback(self._lives.discard)

    def stop(self) -> None:
        """Drops whatever is under way."""
        for life in self._lives:
            life.cancel()

    async def _live(self, task: Task) -> None:
        if task.references_at is None:
            error = await self._references.check(task.input.image_urls, task.base_url)
            self._service.references_seen(task, error)
        submission = task.submission
        if submission.request_type == "callback" and submission.callback_url:
            # A loop may wake a sleeper within its clock's resolution before the time.
            await asyncio.sleep(max(0.0, task.ready_at - self._service.now()) + _A_HAIR)
            if self._weather.fate(task.task_id) == "never-ends":
                return
            envelope = success(task.status(self._service.now(), self._service.epoch))
            delivered = await deliver(
                self._weather, self._courier, submission.callback_url, envelope
            )
            self._service.callback_ended(delivered=delivered)
