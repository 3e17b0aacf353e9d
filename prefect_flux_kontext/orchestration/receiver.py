"""A receiver that tells Prefect when a batch's results are there, and resumes what waits."""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from prefect_flux_kontext.callbacks.completion import CompletionMonitor
from prefect_flux_kontext.errors import FluxKontextError
from prefect_flux_kontext.ledger.store import open_ledger_store
from prefect_flux_kontext.orchestration import events
from prefect_flux_kontext.orchestration.suspension import resume_suspended

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from prefect_flux_kontext.callbacks.inbox import Inbox
    from prefect_flux_kontext.callbacks.tokens import Attempt
    from prefect_flux_kontext.storage.filesystem import OutputFolder

logger = logging.getLogger(__name__)


@asynccontextmanager
async def resume_on_completion(output: OutputFolder, inbox: Inbox) -> AsyncIterator[None]:
    """While the block runs, resume what is suspended for an output once all was called back.

    Before that, the event `flux-kontext.results.ready` is emitted, once for the same rows. No
    callback waits for any of it, and while Prefect's API is away it is tried again and again.

    Example:
        ```python
        @asynccontextmanager
        async def lifespan(app):
            async with resuming(OutputFolder("s3://shop/restyled"), inbox):
                yield

        app = FastAPI(lifespan=lifespan)
        app.mount("/flux", create_receiver(inbox, secret))
        ```

    Args:
        output: The batch's output.
        inbox: The receiver's.

    Raises:
        ConfigurationError: PREFECT_API_URL is not set.
    """
    events.require_api_url()
    told: frozenset[Attempt] = frozenset()

    async def ready(rows: frozenset[Attempt]) -> bool:
        nonlocal told
        try:
            if rows != told:
                payload = {"output": str(output), "rows": len(rows)}
                await events.emit_and_flush(events.RESULTS_READY, str(output), payload)
                told = rows
                logger.info("All %d results of %s were called back.", len(rows), output)
            resumed = await resume_suspended(output)
        except Exception as error:
            raise FluxKontextError(f"Prefect: {type(error).__name__}: {error}") from error
        for flow_run_id in resumed:
            logger.info("Resumed flow run %s.", flow_run_id)
        return bool(resumed)

    awaited = CompletionMonitor(open_ledger_store(output), inbox, ready)
    inbox.on_kept = awaited.kept
    watching = asyncio.create_task(awaited.watch())
    try:
        yield
    finally:
        inbox.on_kept = None
        watching.cancel()
        await asyncio.wait({watching})
