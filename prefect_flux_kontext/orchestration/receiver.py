"""Resuming suspended flow runs from a callback receiver, once all results are ready."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from prefect_flux_kontext.callbacks.completion import CompletionMonitor
from prefect_flux_kontext.errors import FluxKontextError
from prefect_flux_kontext.ledger.store import open_ledger_store
from prefect_flux_kontext.orchestration import events
from prefect_flux_kontext.orchestration.suspension import resume_suspended

if TYPE_CHECKING:
    from prefect_flux_kontext.callbacks.inbox import Inbox
    from prefect_flux_kontext.callbacks.tokens import Attempt
    from prefect_flux_kontext.storage.filesystem import OutputFolder

logger = logging.getLogger(__name__)


@asynccontextmanager
async def resume_on_completion(output: OutputFolder, inbox: Inbox) -> AsyncIterator[None]:
    """Resume the flow runs that wait for an output, once callbacks for all its rows have arrived.

    Before that, emit the event `flux-kontext.results.ready`, once for the same rows. Callbacks do
    not wait for this, and failed requests to Prefect's API are repeated.

    Example:
        ```python
        @asynccontextmanager
        async def lifespan(app):
            async with resume_on_completion(OutputFolder("s3://shop/restyled"), inbox):
                yield

        app = FastAPI(lifespan=lifespan)
        app.mount("/flux", create_receiver(inbox, secret))
        ```

    Args:
        output: The output of the batch.
        inbox: The inbox of the receiver.

    Raises:
        ConfigurationError: PREFECT_API_URL is not set.
    """
    events.require_api_url()
    announced: frozenset[Attempt] = frozenset()

    async def announce_and_resume(rows: frozenset[Attempt]) -> bool:
        nonlocal announced
        try:
            if rows != announced:
                payload = {"output": str(output), "rows": len(rows)}
                await events.emit_and_flush(events.RESULTS_READY, str(output), payload)
                announced = rows
                logger.info("Callbacks for all %d results of %s have arrived.", len(rows), output)
            resumed = await resume_suspended(output)
        except Exception as error:
            raise FluxKontextError(f"Prefect: {type(error).__name__}: {error}") from error
        for flow_run_id in resumed:
            logger.info("Resumed flow run %s.", flow_run_id)
        return bool(resumed)

    monitor = CompletionMonitor(open_ledger_store(output), inbox, announce_and_resume)
    inbox.on_kept = monitor.kept
    watching = asyncio.create_task(monitor.watch())
    try:
        yield
    finally:
        inbox.on_kept = None
        watching.cancel()
        await asyncio.wait({watching})
