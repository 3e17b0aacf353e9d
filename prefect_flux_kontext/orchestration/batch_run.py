"""What the core logs, in the logs of the flow run."""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from prefect import get_run_logger, task
from prefect.assets import Asset
from prefect.cache_policies import NO_CACHE
from prefect.context import FlowRunContext
from prefect.exceptions import MissingContextError
from pydantic import ValidationError

from prefect_flux_kontext.batch.collection import (
    PENDING_COLLECTION,
    find_expiring,
    read_ledger_status,
)
from prefect_flux_kontext.batch.policy import FailurePolicy, RowOptions
from prefect_flux_kontext.batch.session import open_session
from prefect_flux_kontext.batch.summary import BatchSummary
from prefect_flux_kontext.batch.waves import Wave
from prefect_flux_kontext.callbacks.options import resolve_callback_options
from prefect_flux_kontext.client.polling import PollingCadence
from prefect_flux_kontext.credentials import FluxKontextCredentials
from prefect_flux_kontext.errors import LedgerError
from prefect_flux_kontext.ledger.store import open_ledger_store
from prefect_flux_kontext.orchestration import events
from prefect_flux_kontext.orchestration.artifacts import progress_artifact, show_summary
from prefect_flux_kontext.orchestration.events import (
    ROWS_FAILED,
    WAVE_FINISHED,
    counts,
    describe_rows,
    emit,
)
from prefect_flux_kontext.references.resolver import create_references
from prefect_flux_kontext.report.builder import open_report
from prefect_flux_kontext.settings import FluxKontextSettings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from prefect_flux_kontext.batch.planning import Plan
    from prefect_flux_kontext.batch.session import Session
    from prefect_flux_kontext.client.polling import PollingCadence
    from prefect_flux_kontext.credentials import FluxKontextCredentials
    from prefect_flux_kontext.storage.filesystem import OutputFolder

_CORE = logging.getLogger("prefect_flux_kontext")


class _IntoTheRun(logging.Handler):
    """Hands a record of the core's to the logger of the run in whose context it was made."""

    batches = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            run = get_run_logger()
        except MissingContextError:
            return
        if run.isEnabledFor(record.levelno):
            run.log(record.levelno, record.getMessage(), exc_info=record.exc_info)


_handler = _IntoTheRun()


@contextmanager
def forward_core_logs() -> Iterator[None]:
    """Log what the core says in the flow run while the block runs, and nowhere else.

    Where the core's logger has handlers already (PREFECT_LOGGING_EXTRA_LOGGERS), it keeps to
    them.
    """
    if _CORE.handlers and not _handler.batches:
        yield
        return
    if not _handler.batches:
        _CORE.addHandler(_handler)
        _CORE.setLevel(get_run_logger().getEffectiveLevel())
        _CORE.propagate = False
    _handler.batches += 1
    try:
        yield
    finally:
        _handler.batches -= 1
        if not _handler.batches:
            _CORE.removeHandler(_handler)
            _CORE.setLevel(logging.NOTSET)
            _CORE.propagate = True


class PartitionTotals(NamedTuple):
    """What a batch has come to before it is opened, by its parts.

    Attributes:
        spent: Dollars.
        seconds: How long it took.
    """

    spent: float = 0.0
    seconds: float = 0.0


def build_row_options(
    cadence: PollingCadence | None,
    policy: FailurePolicy | None,
    *,
    fit_references: bool = False,
    **decided: Any,
) -> RowOptions:
    """What a flow's parameters and the environment say about its rows.

    Args:
        cadence: When to ask; None for the environment's.
        policy: What a failure means; None for the defaults.
        fit_references: Whether to shrink reference images that are too large.
        **decided: As `RowOptions` has it.
    """
    settings = FluxKontextSettings()
    cadence = cadence or settings.cadence()
    return RowOptions(
        cadence=cadence,
        policy=policy or FailurePolicy(),
        result_days=settings.result_days,
        references=create_references(settings, timeout=cadence.timeout, fit=fit_references),
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
    earlier: PartitionTotals | None = None,
) -> AsyncIterator[tuple[Session, int]]:
    """Open a batch and tell Prefect of it: events, artifacts, logs.

    Args:
        output: Its output.
        account: Who pays.
        options: What a person has decided about its rows.
        plan: What it is to do; None for one that only collects.
        callback_url: Where the service is to call, if that is not the environment's.
        listens: Whether callbacks may be received in this process.
        alert_above_usd: Dollars spent in this run above which an event says so.
        suspends: The flow run is to be suspended afterwards, rather than to end.
        earlier: What its parts have done and told; None where there were none.

    Yields:
        What the batch has open, and the account's limit of tasks running at once.

    Raises:
        ConfigurationError: The output cannot be written to, or see `batch_session`.
        LedgerError: The ledger cannot be read or written; nothing was paid.
    """
    await output.check_writable()
    settings = FluxKontextSettings()
    callbacks = resolve_callback_options(
        settings, url=callback_url, secret=account.callback_secret, listens=listens
    )
    client = account.get_client()
    with forward_core_logs():
        async with (
            open_session(
                client, output, options, settings, callbacks, flow_run_id=_flow_run_id()
            ) as session,
            _told(session, settings, plan, alert_above_usd, earlier, suspends=suspends),
        ):
            yield session, account.concurrent_tasks


@asynccontextmanager
async def _told(
    session: Session,
    settings: FluxKontextSettings,
    plan: Plan | None,
    alert_above_usd: float | None,
    earlier: PartitionTotals | None,
    *,
    suspends: bool,
) -> AsyncIterator[None]:
    folder, batch = session.output, session.rows.progress
    output, flow = str(folder), _flow_name()
    told = _told_at_first(output, plan)
    if earlier is None:
        emit_started(output, plan)
    before = earlier or PartitionTotals()

    def spent() -> float:
        return session.submitter.spent + before.spent

    began = asyncio.get_running_loop().time()
    outcome = "stopped"
    rows = plan.rows if plan is not None else 0
    try:
        async with (
            # Here already, because the summary links to gallery and result manifest.
            open_report(session.report),
            progress_artifact(batch, rows, create_spend_alarm(batch, spent, alert_above_usd)),
        ):
            yield
        outcome = "stored" if batch.complete else "incomplete"
    finally:
        # A submit that is under way may yet turn out to be paid for.
        await asyncio.shield(session.submitter.drained())
        batch.spent = spent()
        batch.seconds = asyncio.get_running_loop().time() - began + before.seconds
        ended = events.BATCH_FINISHED
        if suspends and outcome != "stopped" and batch.outstanding:
            outcome, ended = "submitted", events.BATCH_SUSPENDED
        counts = events.counts(batch)
        left = "yes" if session.submitter.outstanding else "no"
        events.emit(
            ended,
            output,
            {**told, **counts, "outcome": outcome},
            flow=flow,
            outcome=outcome,
            outstanding=left,
        )
        if batch.stored > batch.already_stored and (key := _asset_key(output)):
            events.emit_asset(key, counts)
        await show_summary(batch, folder, outcome, settings.public_urls)


def emit_started(output: str, plan: Plan | None) -> None:
    """Emit that a batch starts, and what it is to do."""
    events.emit(events.BATCH_STARTED, output, _told_at_first(output, plan), flow=_flow_name())


def _told_at_first(output: str, plan: Plan | None) -> dict[str, Any]:
    told: dict[str, Any] = {"output": output, "flow": _flow_name()}
    if plan is not None:
        told |= {"rows": plan.rows, "to_pay": plan.to_pay, "price_usd": round(plan.price, 6)}
    return told


def create_spend_alarm(
    batch: BatchSummary, spent: Callable[[], float], above: float | None
) -> Callable[[], None]:
    """What looks at the money now and then, and says once that it is more than a person wanted."""
    flow, told = _flow_name(), False

    def tick() -> None:
        nonlocal told
        batch.spent = spent()
        if above is not None and batch.spent > above and not told:
            told = True
            payload = {"output": batch.output, "spent": batch.spent, "above": above}
            events.emit(events.SPEND_ABOVE, batch.output, payload, flow=flow)

    return tick


async def emit_expiring_results(output: OutputFolder) -> None:
    """Emit an event where results that are paid for and not stored will soon be gone."""
    try:
        status = await read_ledger_status(open_ledger_store(output))
    except LedgerError:
        return  # the run has just told so itself
    soon = find_expiring(status.outstanding, FluxKontextSettings().result_days)
    if not soon:
        return
    first, left = min(soon, key=lambda told: told[1])
    payload = {
        "output": str(output),
        "rows": len(soon),
        "task_id": first.task.task_id,
        "days_left": round(left.total_seconds() / 86_400, 2),
    }
    events.emit(events.RESULTS_EXPIRING, str(output), payload, flow=_flow_name())


def _asset_key(output: str) -> str | None:
    """The output as the key of an asset, where it can be one."""
    try:
        return Asset(key=output).key
    except ValidationError:
        return None


def _flow_run_id() -> str | None:
    context = FlowRunContext.get()
    return str(context.flow_run.id) if context and context.flow_run else None


def _flow_name() -> str:
    context = FlowRunContext.get()
    return context.flow.name if context is not None and context.flow is not None else "none"


@task(name="wave", task_run_name="wave-{wave.number}", retries=0, cache_policy=NO_CACHE)
async def run_wave(wave: Wave) -> BatchSummary:
    """Run a block of rows as one task run: one for each image would drown the server."""
    logger = get_run_logger()
    summary = await wave.run()
    failures = [row for row in summary.failures if row.reason != PENDING_COLLECTION]
    for row in failures:
        logger.warning(
            "Row %s (line %d, task %s) is %s: %s",
            row.told,
            row.line,
            row.task_id,
            row.state,
            row.message,
        )
    logger.info("Wave %d: %s.", wave.number, summary)
    batch = wave.batch
    told = {"output": batch.output, "wave": wave.number}
    if failures:
        rows = {"rows": describe_rows(failures), "reasons": summary.reasons}
        emit(ROWS_FAILED, batch.output, {**told, **rows})
    spent = {"batch_spent_usd": round(batch.spent, 6), "batch_rows": batch.rows}
    emit(WAVE_FINISHED, batch.output, {**told, **counts(summary), **spent})
    return summary
