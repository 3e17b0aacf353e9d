"""The way of one row: submit, wait, store; and of a wave of rows side by side."""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from prefect_flux_kontext.api.waiting import wait_until_ended
from prefect_flux_kontext.batch.summary import BatchSummary, RowOutcome
from prefect_flux_kontext.errors import BatchStoppedError, FluxKontextError
from prefect_flux_kontext.manifest.rows import RefusedRow
from prefect_flux_kontext.results import download_client, persist_result

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    import httpx

    from prefect_flux_kontext.api.cadence import PollingCadence
    from prefect_flux_kontext.api.client import FluxKontextClient
    from prefect_flux_kontext.manifest.rows import Row
    from prefect_flux_kontext.models import GenerationTask
    from prefect_flux_kontext.storage import OutputFolder

logger = logging.getLogger(__name__)


class RowRunner:
    """Runs rows with one client, one connection pool and one governor for all of them.

    Attributes:
        progress: What became of the rows so far; it moves while they run.
        submitted: Rows whose task the service has accepted so far.
        stopped: The error that ended the batch for the rows not yet submitted.
    """

    def __init__(
        self,
        client: FluxKontextClient,
        http: httpx.AsyncClient,
        output: OutputFolder,
        cadence: PollingCadence,
    ) -> None:
        self.progress = BatchSummary(output=str(output))
        self.submitted = 0
        self.stopped: FluxKontextError | None = None
        self._client = client
        self._http = http
        self._output = output
        self._cadence = cadence

    async def run_wave(self, rows: Sequence[Row | RefusedRow]) -> BatchSummary:
        """Run rows side by side and count what became of them; a bad row fails alone."""
        wave = BatchSummary()
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(self._run(row)) for row in rows]
        for row in running:
            wave.count(row.result())
        return wave

    async def _run(self, row: Row | RefusedRow) -> RowOutcome:
        outcome = await self._outcome(row)
        self.progress.count(outcome)
        return outcome

    async def _outcome(self, row: Row | RefusedRow) -> RowOutcome:
        if isinstance(row, RefusedRow):
            return RowOutcome(
                id=row.id, line=row.line, state="failed", reason="refused", message=row.reason
            )
        task: GenerationTask | None = None
        try:
            task = await self._client.submit(row.request, before_post=self._check_going_on)
            self.submitted += 1
            result = await wait_until_ended(self._client, task, self._cadence)
            images = await persist_result(result, self._output, self._http, name=row.id)
        except FluxKontextError as error:
            return self._failed(row, task, error)
        except Exception as error:
            # A surprise in one row must not cancel the paid rows beside it.
            logger.exception("Row %s (line %d) met an unforeseen error.", row.id, row.line)
            return self._failed(row, task, FluxKontextError(f"{type(error).__name__}: {error}"))
        return RowOutcome(
            id=row.id,
            line=row.line,
            state="stored",
            task_id=task.task_id,
            uris=[image.uri for image in images],
        )

    async def _check_going_on(self) -> None:
        if self.stopped is not None:
            raise BatchStoppedError(f"Not submitted: {self.stopped}")

    def _failed(
        self, row: Row, task: GenerationTask | None, error: FluxKontextError
    ) -> RowOutcome:
        if error.fatal and self.stopped is None:
            logger.error("The batch stops submitting: %s", error)
            self.stopped = error
        return RowOutcome(
            id=row.id,
            line=row.line,
            state="not_submitted" if error.fatal and task is None else "failed",
            reason=error.reason,
            message=error.message,
            task_id=task.task_id if task else error.task_id,
        )


@asynccontextmanager
async def row_runner(
    client: FluxKontextClient, output: OutputFolder, cadence: PollingCadence
) -> AsyncIterator[RowRunner]:
    """A runner with its connections, closed afterwards."""
    async with client, download_client() as http:
        yield RowRunner(client, http, output, cadence)
