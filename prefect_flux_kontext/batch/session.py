"""The open resources of a running batch: connections, ledger, heartbeat, report."""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from prefect_flux_kontext.batch.budget import open_budget
from prefect_flux_kontext.batch.deferral import Deferral
from prefect_flux_kontext.batch.index import LedgerIndex
from prefect_flux_kontext.batch.outage import PostGate
from prefect_flux_kontext.batch.policy import Breaker
from prefect_flux_kontext.batch.stopping import StopGate, stop_on_signals
from prefect_flux_kontext.batch.submission import Submitter
from prefect_flux_kontext.batch.summary import BatchSummary
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
from prefect_flux_kontext.storage.atomic import remove_temporary_files

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from prefect_flux_kontext.batch.policy import RowOptions
    from prefect_flux_kontext.batch.summary import RowName, RowOutcome
    from prefect_flux_kontext.callbacks.session import CallbackSession
    from prefect_flux_kontext.client.client import FluxKontextClient
    from prefect_flux_kontext.client.transport import Connections
    from prefect_flux_kontext.ledger.records import Entry
    from prefect_flux_kontext.settings import FluxKontextSettings
    from prefect_flux_kontext.storage.filesystem import OutputFolder

logger = logging.getLogger(__name__)

_MAX_IMAGES_IN_MEMORY = 64
"""Images that are downloaded, checked or stored at a time; more would only use more memory."""


@dataclass(kw_only=True)
class Session:
    """The open resources of a batch, and the state of its run so far.

    Attributes:
        client: The client of the service.
        http: The connections for downloads.
        settings: The settings from the environment.
        options: The user's options for the rows.
        output: Where images and the ledger go.
        ledger: The ledger, owned by this run.
        index: What the ledger held when the run began.
        submitter: Pays for rows.
        callbacks: Receives callbacks.
        deferral: Limits how long rows wait for their results.
        report: The result manifest and the gallery.
        checks: Flags images that are likely wrong.
        balance: Dollars of the account before the batch; None if the service did not say.
        flow_run_id: The Prefect flow run that the result lines name; None outside of one.
        submits: Whether rows are paid for; else only outstanding rows are collected.
        progress: The summary of the rows so far, updated while they run.
        failed: The cells of each row that failed, and its outcome.
        run_again: Names of rows that failed before and are run again; without those that were
            not submitted.
        latest: The latest ledger entries of rows in unfinished waves, by row key.
        locks: A lock for each row key in progress, so that equal rows run one after the other.
        breaker: Detects that nearly all rows fail.
        images_in_memory: Limits the images that are downloaded, checked or stored at a time.
    """

    client: FluxKontextClient
    http: Connections
    settings: FluxKontextSettings
    options: RowOptions
    output: OutputFolder
    ledger: Ledger
    index: LedgerIndex
    submitter: Submitter
    callbacks: CallbackSession
    deferral: Deferral
    report: Report
    checks: ResultChecks
    balance: float | None = None
    flow_run_id: str | None = None
    submits: bool = True
    progress: BatchSummary = field(init=False)
    failed: list[tuple[Mapping[str, str], RowOutcome]] = field(default_factory=list)
    run_again: set[RowName] = field(default_factory=set)
    latest: dict[str, Entry] = field(default_factory=dict)
    locks: WeakValueDictionary[str, asyncio.Lock] = field(default_factory=WeakValueDictionary)
    breaker: Breaker = field(default_factory=Breaker)
    images_in_memory: asyncio.Semaphore = field(
        default_factory=lambda: asyncio.Semaphore(_MAX_IMAGES_IN_MEMORY)
    )
    _collected: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.progress = BatchSummary(output=str(self.output))

    def mark_ended(self, entry: Entry) -> None:
        """Note that the row's task ended in this run."""
        if not self._is_paid_by_run(entry):
            self._collected.add(entry.key)

    def has_ended_in_run(self, entry: Entry) -> bool:
        """Whether an ended task ended in this run, which need not be the run that paid for it."""
        return self._is_paid_by_run(entry) or entry.key in self._collected

    def _is_paid_by_run(self, entry: Entry) -> bool:
        return entry.intent is not None and entry.intent.owner == self.ledger.owner


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
        balance = await client.check()
        await bind(store, client.base_url, account or settings.account)
        async with keep_heartbeat(
            store, beat_seconds=settings.heartbeat, has_budget=options.has_budget
        ) as heartbeat:
            owner = heartbeat.owner
            ledger = Ledger(store, owner, settings.prices())
            budget = await open_budget(store, heartbeat, options)
            report = Report(output, store, owner, http, settings, is_whole=is_whole)
            with await asyncio.to_thread(LedgerIndex) as index:
                await index.read_finished(store)
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
                        options.money_columns,
                    )
                    session = Session(
                        client=client,
                        http=http,
                        settings=settings,
                        options=options,
                        output=output,
                        ledger=ledger,
                        index=index,
                        submitter=submitter,
                        callbacks=callback_session,
                        deferral=Deferral(on=options.deferred),
                        report=report,
                        checks=ResultChecks(options.checks),
                        balance=balance,
                        flow_run_id=flow_run_id,
                    )
                    with stop_on_signals(submitter.gate):
                        try:
                            yield session
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
