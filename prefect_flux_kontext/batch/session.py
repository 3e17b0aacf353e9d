"""The open resources of a running batch: connections, ledger, heartbeat, report."""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prefect_flux_kontext.batch.budget import open_budget
from prefect_flux_kontext.batch.collection import Deferral
from prefect_flux_kontext.batch.index import StoredRows
from prefect_flux_kontext.batch.outage import PostGate
from prefect_flux_kontext.batch.row import RowRunner, create_row_storer
from prefect_flux_kontext.batch.stopping import StopGate, stop_on_signals
from prefect_flux_kontext.batch.submission import Submitter
from prefect_flux_kontext.callbacks.options import CallbackOptions
from prefect_flux_kontext.callbacks.session import open_callback_session
from prefect_flux_kontext.errors import BatchStoppedError
from prefect_flux_kontext.images.checks import ResultChecks
from prefect_flux_kontext.images.download import open_download_client
from prefect_flux_kontext.ledger.head import bind
from prefect_flux_kontext.ledger.heartbeat import keep_heartbeat
from prefect_flux_kontext.ledger.ledger import Ledger
from prefect_flux_kontext.ledger.probe import probe_store
from prefect_flux_kontext.ledger.store import LEDGER_FOLDER, open_ledger_store
from prefect_flux_kontext.references.ratio import RatioMatcher
from prefect_flux_kontext.report.builder import Report, open_report
from prefect_flux_kontext.storage.cleanup import remove_temporary_files

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from prefect_flux_kontext.batch.policy import RowOptions
    from prefect_flux_kontext.client.client import FluxKontextClient
    from prefect_flux_kontext.settings import FluxKontextSettings
    from prefect_flux_kontext.storage.filesystem import OutputFolder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """The open resources of a batch.

    Attributes:
        output: Where images and the ledger go.
        ledger: The ledger, owned by this run.
        submitter: Pays for rows.
        rows: Runs rows.
        stored: The rows that earlier runs have stored.
        report: The result manifest and the gallery.
    """

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
    account: str | None = None,
    is_whole: bool = True,
    flow_run_id: str | None = None,
) -> AsyncIterator[Session]:
    """Open the resources of a batch, and close them at the end of the block.

    However the block ends, the outcome of every POST that has begun is recorded before this
    returns.

    Args:
        client: The client of the service.
        output: Where images and the ledger go.
        options: The user's options for the rows.
        settings: The settings from the environment.
        callbacks: How callbacks are received; None polls only.
        account: Label of the account; None for the one in the settings.
        is_whole: Whether the run has the whole batch, and so writes its reports at the end.
        flow_run_id: The Prefect flow run that the result lines name; None outside of one.

    Raises:
        ConfigurationError: The store cannot hold a ledger; there is a budget, and another run is
            paying into the output; the output's ledger belongs to another service or account; or
            callbacks cannot be received.
        LedgerError: The ledger cannot be read or written; nothing was paid.
        NotConnectedError: No service answers at the base URL.
        UnauthorizedError: The service refused the key.
    """
    store = open_ledger_store(output)
    await probe_store(store)
    await remove_temporary_files(output)
    await remove_temporary_files(output.below(LEDGER_FOLDER), recursive=True)
    async with client, open_download_client(base_url=client.base_url) as http:
        await client.check()
        await bind(store, client.base_url, account or settings.account)
        has_budget = options.budget_usd is not None or options.share_usd is not None
        async with keep_heartbeat(
            store, beat_seconds=settings.heartbeat, has_budget=has_budget
        ) as heartbeat:
            owner = heartbeat.owner
            ledger = Ledger(store, owner, settings.prices())
            budget = await open_budget(store, heartbeat, options)
            report = Report(output, store, owner, http, settings, is_whole=is_whole)
            with await asyncio.to_thread(StoredRows) as stored:
                await stored.read(store)
                async with (
                    open_callback_session(
                        callbacks or CallbackOptions(), client, ledger
                    ) as callback_session,
                    open_report(report),
                ):
                    submitter = Submitter(
                        client,
                        ledger,
                        PostGate(
                            settings.concurrent_submits,
                            client.is_answering,
                            patience_seconds=settings.outage_timeout,
                        ),
                        budget,
                        options.references,
                        RatioMatcher(http if settings.match_references else None),
                        callback_session.prepare_request,
                        StopGate(settings.stop_timeout),
                    )
                    deferral = Deferral(on=options.deferred)
                    store_row = create_row_storer(
                        client,
                        http,
                        output,
                        report.pictures,
                        ResultChecks(options.checks),
                        callback_session,
                        deferral,
                        options.cadence,
                        result_days=options.result_days,
                        ai_mark=settings.ai_mark,
                    )
                    rows = RowRunner(
                        store_row, output, ledger, submitter, callback_session, deferral, options
                    )
                    with stop_on_signals(submitter.gate):
                        try:
                            yield Session(
                                output, ledger, submitter, rows, stored, report, flow_run_id
                            )
                        finally:
                            submitter.stop(BatchStoppedError("The batch is over."))
                            await submitter.drain()
                            options.references.close()
                            _warn_of_outstanding(submitter, output)


def _warn_of_outstanding(submitter: Submitter, output: OutputFolder) -> None:
    if number := len(submitter.outstanding):
        logger.warning(
            "%d %s paid for and not yet stored. To collect: flux-kontext collect %s",
            number,
            "row is" if number == 1 else "rows are",
            output,
        )
