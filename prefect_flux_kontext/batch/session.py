"""What a batch needs open while it runs: connections, ledger, owner; all closed afterwards."""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prefect_flux_kontext.batch.budget import open_budget
from prefect_flux_kontext.batch.collection import Deferral
from prefect_flux_kontext.batch.index import StoredRows
from prefect_flux_kontext.batch.row import RowRunner, create_row_storer
from prefect_flux_kontext.batch.submission import Submitter
from prefect_flux_kontext.callbacks.options import CallbackOptions
from prefect_flux_kontext.callbacks.session import open_callback_session
from prefect_flux_kontext.errors import BatchStoppedError
from prefect_flux_kontext.images.download import open_download_client
from prefect_flux_kontext.ledger.heartbeat import keep_heartbeat
from prefect_flux_kontext.ledger.ledger import Ledger
from prefect_flux_kontext.ledger.store import LEDGER_FOLDER, open_ledger_store
from prefect_flux_kontext.report.builder import Report, open_report
from prefect_flux_kontext.storage.cleanup import sweep

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from prefect_flux_kontext.batch.policy import RowOptions
    from prefect_flux_kontext.client.client import FluxKontextClient
    from prefect_flux_kontext.settings import FluxKontextSettings
    from prefect_flux_kontext.storage.filesystem import OutputFolder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """A batch's open things."""

    output: OutputFolder
    ledger: Ledger
    submitter: Submitter
    rows: RowRunner
    stored: StoredRows
    report: Report
    flow_run_id: str | None = None


@asynccontextmanager
async def open_session(
    client: FluxKontextClient,
    output: OutputFolder,
    options: RowOptions,
    settings: FluxKontextSettings,
    callbacks: CallbackOptions | None = None,
    *,
    whole: bool = True,
    flow_run_id: str | None = None,
) -> AsyncIterator[Session]:
    """Open what a batch needs.

    However the block is left, POSTs that have begun are recorded before this returns.

    Args:
        client: The service.
        output: Where images and the ledger go.
        options: What a person has decided about the rows.
        settings: The environment's.
        callbacks: How the batch is called back; None to poll.
        whole: Whether the run has the whole batch, and so tells of it in the end.
        flow_run_id: The Prefect flow run that the result lines name; None outside of one.

    Raises:
        ConfigurationError: There is a budget, and another run is paying into the output; or
            callbacks cannot be received.
        LedgerError: The ledger cannot be read or written; nothing was paid.
        NotConnectedError: Nothing answers at the base URL.
        UnauthorizedError: The service does not know the key.
    """
    store = open_ledger_store(output)
    await sweep(output)
    await sweep(output.below(LEDGER_FOLDER), recursive=True)
    async with client, open_download_client(base_url=client.base_url) as http:
        await client.check()
        async with keep_heartbeat(store) as owner:
            ledger = Ledger(store, owner, settings.prices())
            budget = await open_budget(store, owner, options)
            report = Report(output, store, owner, http, settings, whole=whole)
            with await asyncio.to_thread(StoredRows) as stored:
                await stored.read(store)
                async with (
                    open_callback_session(
                        callbacks or CallbackOptions(), client, ledger
                    ) as called,
                    open_report(report),
                ):
                    submitter = Submitter(
                        client,
                        ledger,
                        settings.concurrent_submits,
                        budget,
                        options.references,
                        called.request,
                    )
                    deferral = Deferral(on=options.deferred)
                    store_row = create_row_storer(
                        client,
                        http,
                        output,
                        report.pictures,
                        called,
                        deferral,
                        options.cadence,
                        ai_mark=settings.ai_mark,
                    )
                    rows = RowRunner(
                        store_row, output, ledger, submitter, called, deferral, options
                    )
                    try:
                        yield Session(output, ledger, submitter, rows, stored, report, flow_run_id)
                    finally:
                        submitter.stop(BatchStoppedError("The batch is over."))
                        await asyncio.shield(submitter.drained())
                        _warn_of_what_is_owed(submitter, output)


def _warn_of_what_is_owed(submitter: Submitter, output: OutputFolder) -> None:
    if submitter.outstanding:
        logger.warning(
            "%d rows are paid for and not yet stored. To collect them: flux-kontext collect %s",
            len(submitter.outstanding),
            output,
        )
