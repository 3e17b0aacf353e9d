"""A batch inside a flow run: its options, events, artifacts and logs, and the task of a wave."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    asynccontextmanager,
    contextmanager,
    nullcontext,
)
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from prefect import get_run_logger, task
from prefect.assets import AssetProperties
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import MissingContextError, TerminationSignal
from prefect.runtime import flow_run
from prefect.utilities import engine

from prefect_flux_kontext.batch.collection import find_expiring
from prefect_flux_kontext.batch.deferral import PENDING_COLLECTION
from prefect_flux_kontext.batch.policy import FailurePolicy, RowOptions
from prefect_flux_kontext.batch.progress import ProgressLine
from prefect_flux_kontext.batch.session import Session, open_session
from prefect_flux_kontext.batch.spending import Spending
from prefect_flux_kontext.batch.status import read_ledger_status
from prefect_flux_kontext.batch.summary import BatchSummary
from prefect_flux_kontext.batch.waves import Wave
from prefect_flux_kontext.callbacks.options import resolve_callback_options
from prefect_flux_kontext.errors import LedgerError
from prefect_flux_kontext.images.checks import load_checks
from prefect_flux_kontext.ledger.store import open_ledger_store
from prefect_flux_kontext.orchestration import events
from prefect_flux_kontext.orchestration.partitions.leases import lease_slots
from prefect_flux_kontext.orchestration.run_page import (
    find_browser_url,
    progress_artifact,
    publish_summary,
)
from prefect_flux_kontext.references.resolver import create_references
from prefect_flux_kontext.report.builder import open_report
from prefect_flux_kontext.report.gallery.builder import GALLERY
from prefect_flux_kontext.settings import FluxKontextSettings

if TYPE_CHECKING:
    from prefect_flux_kontext.batch.planning import Plan
    from prefect_flux_kontext.client.limits.account import AccountLimiter
    from prefect_flux_kontext.credentials import FluxKontextCredentials
    from prefect_flux_kontext.orchestration.parameters import AdvancedOptions
    from prefect_flux_kontext.storage.filesystem import OutputFolder

_core_logger = logging.getLogger("prefect_flux_kontext")

_ENGINE_HANDLER = "_prefect_sigterm_handler"
_engine_handler = getattr(engine, _ENGINE_HANDLER, None)


class PartitionTotals(NamedTuple):
    """What the partitions of a batch have spent before the batch itself runs, in dollars."""

    spent: float = 0.0
    seconds: float = 0.0  # from their start to their end
    new: Spending = Spending()  # what the output has cost after them, by columns
    old: Spending = Spending()  # the same before them
    balance: float | None = None  # of the account before them, where known


def build_row_options(
    advanced: AdvancedOptions,
    account: FluxKontextCredentials,
    *,
    deferred: bool = False,
    **decided: Any,
) -> RowOptions:
    """Build the row options of a batch from the parameters of its flow and the environment."""
    settings = FluxKontextSettings()
    cadence = advanced.get("cadence") or settings.cadence()
    return RowOptions(
        cadence=cadence,
        policy=advanced.get("failure_policy") or FailurePolicy(),
        resubmit_unknown=advanced.get("resubmit_unknown", False),
        spend_by=advanced.get("spend_by") or (),
        result_days=settings.result_days,
        references=create_references(
            settings,
            None if deferred else account.base_url,
            timeout=cadence.timeout,
            fit=advanced.get("fit_references", False),
        ),
        deferred=deferred,
        checks=load_checks(advanced.get("checks") or ()),
        **decided,
    )


@asynccontextmanager
async def open_batch(
    output: OutputFolder,
    account: FluxKontextCredentials,
    options: RowOptions,
    plan: Plan | None = None,
    *,
    callback_url: str | None = None,
    listens: bool = True,
    alert_above_usd: float | None = None,
    suspends: bool = False,
    partition_totals: PartitionTotals | None = None,
    account_limit: str | None = None,
) -> AsyncIterator[tuple[Session, int]]:
    """Open a batch, and report it to Prefect in events, artifacts and logs.

    Without a plan, it only collects. With totals of partitions, its start was emitted before. With
    the name of a limit, it leases a share of it.

    Yields:
        The session of the batch, and how many tasks the account may run at a time.

    Raises:
        ConfigurationError: The output cannot be written to, there is no such limit, or as for
            `open_session`.
        LedgerError: The ledger cannot be read or written; nothing was paid.
    """
    await output.check_writable()
    logging.getLogger("asyncio").addFilter(is_no_termination)
    leasing = lease_slots(account_limit, account) if account_limit else nullcontext()
    with forward_core_logs():
        async with (
            leasing as lease,
            open_account_session(
                output,
                account,
                options,
                callback_url,
                listens=listens,
                limiter=None if lease is None else lease.limiter,
                flow_run_id=flow_run.id,
            ) as session,
            _report_batch(session, plan, alert_above_usd, partition_totals, suspends=suspends),
        ):
            if lease is not None:
                lease.stop_when_lost(session.submitter)
            if plan is not None:
                await session.report.announce(plan.new_rows)
            if partition_totals is not None:
                session.submitter.spending.add_difference(
                    partition_totals.new, partition_totals.old
                )
                session.balance = partition_totals.balance
            with acknowledge_termination():
                yield session, account.concurrent_tasks


def open_account_session(
    output: OutputFolder,
    account: FluxKontextCredentials,
    options: RowOptions,
    callback_url: str | None,
    *,
    listens: bool,
    limiter: AccountLimiter | None = None,
    **session: Any,
) -> AbstractAsyncContextManager[Session]:
    """Open a session that an account pays for, by the settings of the environment."""
    settings, secret = FluxKontextSettings(), account.callback_secret
    callbacks = resolve_callback_options(
        settings, url=callback_url, secret=secret, listens=listens
    )
    client = account.get_client()
    if limiter is not None:
        client.limiter = limiter
    return open_session(
        client, output, options, settings, callbacks, account=account.account, **session
    )


@contextmanager
def acknowledge_termination() -> Iterator[None]:
    """Let Prefect's engine acknowledge a stop while the batch handles SIGTERM.

    `prefect flow-run execute`, as Docker and Kubernetes pools run it, kills an engine at once
    whose handler of SIGTERM is not Prefect's own, and the rows being submitted are then unknown.
    The batch's handler calls Prefect's as soon as their replies are on record.
    """
    handler = signal.getsignal(signal.SIGTERM)
    if _engine_handler is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    setattr(engine, _ENGINE_HANDLER, handler)
    try:
        yield
    finally:
        setattr(engine, _ENGINE_HANDLER, _engine_handler)


@asynccontextmanager
async def _report_batch(
    session: Session,
    plan: Plan | None,
    alert_above_usd: float | None,
    partition_totals: PartitionTotals | None,
    *,
    suspends: bool,
) -> AsyncIterator[None]:
    """Write the report of a batch, and its events and artifacts, while the block runs."""
    folder, batch, settings = session.output, session.progress, FluxKontextSettings()
    output, flow = str(folder), _get_flow_name()
    if partition_totals is None:
        emit_started(output, plan)
    before = partition_totals or PartitionTotals()

    def spent() -> float:
        return session.submitter.spent + before.spent

    started_at = asyncio.get_running_loop().time()
    outcome = "stopped"
    rows = plan.rows if plan is not None else 0
    try:
        async with (
            # Closed before the summary is written, which links to the files of the report.
            open_report(session.report),
            progress_artifact(
                batch,
                rows,
                ProgressLine(session, rows),
                create_spend_alarm(batch, spent, alert_above_usd),
            ),
        ):
            yield
        outcome = "stored" if batch.complete else "incomplete"
    finally:
        # A submit that is under way may still be accepted and billed.
        await session.submitter.drain()
        batch.spent = spent()
        batch.spent_by = session.submitter.spending.list_groups()
        batch.seconds = asyncio.get_running_loop().time() - started_at + before.seconds
        event = events.BATCH_FINISHED
        if suspends and outcome != "stopped" and batch.outstanding:
            outcome, event = "submitted", events.BATCH_SUSPENDED
        counts = events.build_counts(batch)
        events.emit(
            event,
            output,
            {**_build_start_payload(output, plan), **counts, "outcome": outcome},
            flow=flow,
            outcome=outcome,
            outstanding="yes" if session.submitter.outstanding else "no",
        )
        stopped = isinstance(sys.exception(), Exception)
        added = batch.stored > batch.already_stored
        if stopped or added or batch.failed:
            events.emit_asset(
                output,
                _list_sources(plan),
                _build_asset_properties(folder, settings),
                counts,
                failed=stopped or not added,
            )
        await publish_summary(batch, folder, outcome, settings.public_urls)


def is_no_termination(record: logging.LogRecord) -> bool:
    """Whether a record of asyncio is about anything but a cancelled flow run.

    Prefect ends the process of a cancelled flow run with an exception, whose traceback asyncio
    would log.
    """
    return not (record.exc_info and isinstance(record.exc_info[1], TerminationSignal))


def emit_started(output: str, plan: Plan | None) -> None:
    """Emit the event that a batch starts, with the numbers of its plan."""
    payload = _build_start_payload(output, plan)
    events.emit(events.BATCH_STARTED, output, payload, flow=_get_flow_name())


def _build_start_payload(output: str, plan: Plan | None) -> dict[str, Any]:
    payload: dict[str, Any] = {"output": output, "flow": _get_flow_name()}
    if plan is not None:
        payload |= {"rows": plan.rows, "to_pay": plan.to_pay, "price_usd": round(plan.price, 6)}
    return payload


def create_spend_alarm(
    batch: BatchSummary, spent: Callable[[], float], above_usd: float | None
) -> Callable[[], None]:
    """Create a function that updates what a batch has spent, and emits one event above a limit."""
    flow, was_emitted = _get_flow_name(), False

    def check_spending() -> None:
        nonlocal was_emitted
        batch.spent = spent()
        if above_usd is not None and batch.spent > above_usd and not was_emitted:
            was_emitted = True
            payload = {"output": batch.output, "spent_usd": batch.spent, "above_usd": above_usd}
            events.emit(events.SPEND_ABOVE, batch.output, payload, flow=flow)

    return check_spending


async def emit_expiring_results(output: OutputFolder) -> None:
    """Emit an event if results that are paid for and not stored expire within days."""
    try:
        status = await read_ledger_status(open_ledger_store(output))
    except LedgerError:
        return  # the run has just raised or logged the same error
    expiring = find_expiring(status.outstanding, FluxKontextSettings().result_days)
    if not expiring:
        return
    first, left = min(expiring, key=lambda found: found[1])
    payload = {
        "output": str(output),
        "rows": len(expiring),
        "task_id": first.task.task_id,
        "days_left": round(left.total_seconds() / 86_400, 2),
    }
    events.emit(events.RESULTS_EXPIRING, str(output), payload, flow=_get_flow_name())


def _list_sources(plan: Plan | None) -> list[str]:
    """Return the manifest and the folders of the references of a plan."""
    if plan is None:
        return []
    manifest = plan.url if "://" in plan.url else str(Path(plan.url).absolute())
    return [manifest, *plan.reference_folders.values()]


def _build_asset_properties(
    folder: OutputFolder, settings: FluxKontextSettings
) -> AssetProperties:
    """Build what Prefect shows about an output; a property that is not set keeps its value."""
    properties: dict[str, Any] = {
        "name": str(folder).rpartition("/")[2],
        "url": find_browser_url(folder.uri(GALLERY), settings.public_urls),
        "owners": settings.asset_owners,
    }
    return AssetProperties(**{name: value for name, value in properties.items() if value})


def _get_flow_name() -> str:
    return flow_run.flow_name or "none"


# One task run an image would overload the server, which records about 12 to 40 a second.
@task(name="wave", task_run_name="wave-{wave.number}", retries=0, cache_policy=NO_CACHE)
async def run_wave(wave: Wave) -> BatchSummary:
    """Run a wave of rows as one task run."""
    logger = get_run_logger()
    summary = await wave.run()
    failures = [row for row in summary.failures if row.reason != PENDING_COLLECTION]
    for row in failures:
        logger.warning(
            "Row %s (line %d, task %s) %s: %s",
            row.label,
            row.line,
            row.task_id or "none",
            row.state if row.state == "failed" else f"is {row.state}",
            row.message,
        )
    logger.info("Wave %d: %s.", wave.number, summary)
    batch = wave.batch
    labels = {"output": batch.output, "wave": wave.number}
    if failures:
        rows = {"rows": events.describe_rows(failures), "reasons": summary.reasons}
        events.emit(events.ROWS_FAILED, batch.output, {**labels, **rows})
    totals = {"batch_spent_usd": round(batch.spent, 6), "batch_rows": batch.rows}
    payload = {**labels, **events.build_counts(summary), **totals}
    events.emit(events.WAVE_FINISHED, batch.output, payload)
    return summary


class _RunLogHandler(logging.Handler):
    """Passes records of the core to the logger of the run in whose context they were made."""

    batches = 0  # of this process that use the handler

    def emit(self, record: logging.LogRecord) -> None:
        try:
            run_logger = get_run_logger()
        except MissingContextError:
            return
        if run_logger.isEnabledFor(record.levelno):
            run_logger.log(record.levelno, record.getMessage(), exc_info=record.exc_info)


_handler = _RunLogHandler()


@contextmanager
def forward_core_logs() -> Iterator[None]:
    """Log the messages of the core in the flow run while the block runs, and nowhere else.

    If the core's logger has handlers already (PREFECT_LOGGING_EXTRA_LOGGERS), it uses only those.
    """
    if _core_logger.handlers and not _handler.batches:
        yield
        return
    if not _handler.batches:
        _core_logger.addHandler(_handler)
        _core_logger.setLevel(get_run_logger().getEffectiveLevel())
        _core_logger.propagate = False
    _handler.batches += 1
    try:
        yield
    finally:
        _handler.batches -= 1
        if not _handler.batches:
            _core_logger.removeHandler(_handler)
            _core_logger.setLevel(logging.NOTSET)
            _core_logger.propagate = True
