"""What the flows over a whole batch share: they open it, and tell Prefect how it goes."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from prefect.assets import Asset
from prefect.context import FlowRunContext
from pydantic import ValidationError

from prefect_flux_kontext import events
from prefect_flux_kontext.artifacts import moving_progress, show_summary
from prefect_flux_kontext.batch.batch import expiring
from prefect_flux_kontext.batch.session import batch_session, ledger_store
from prefect_flux_kontext.batch.status import ledger_status
from prefect_flux_kontext.callbacks.options import callback_options
from prefect_flux_kontext.errors import LedgerError
from prefect_flux_kontext.logs import core_logs
from prefect_flux_kontext.report.report import reported
from prefect_flux_kontext.settings import FluxKontextSettings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from prefect_flux_kontext.batch.options import RowOptions
    from prefect_flux_kontext.batch.planning import Plan
    from prefect_flux_kontext.batch.session import Session
    from prefect_flux_kontext.credentials import FluxKontextCredentials
    from prefect_flux_kontext.storage import OutputFolder


@asynccontextmanager
async def opened(
    output: OutputFolder,
    account: FluxKontextCredentials,
    options: RowOptions,
    plan: Plan | None = None,
    *,
    callback_url: str | None = None,
    listens: bool = True,
    alert_above_usd: float | None = None,
    suspends: bool = False,
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

    Yields:
        What the batch has open, and the account's limit of tasks running at once.

    Raises:
        ConfigurationError: The output cannot be written to, or see `batch_session`.
        LedgerError: The ledger cannot be read or written; nothing was paid.
    """
    await output.check_writable()
    settings = FluxKontextSettings()
    callbacks = callback_options(
        settings, url=callback_url, secret=account.callback_secret, listens=listens
    )
    client = account.get_client()
    with core_logs():
        async with (
            batch_session(client, output, options, settings, callbacks) as session,
            _told(session, settings, plan, alert_above_usd, suspends=suspends),
        ):
            yield session, account.concurrent_tasks


@asynccontextmanager
async def _told(
    session: Session,
    settings: FluxKontextSettings,
    plan: Plan | None,
    alert_above_usd: float | None,
    *,
    suspends: bool,
) -> AsyncIterator[None]:
    folder, batch = session.output, session.rows.progress
    output, flow = str(folder), _flow_name()
    told: dict[str, Any] = {"output": output, "flow": flow}
    if plan is not None:
        told |= {"rows": plan.rows, "to_pay": plan.to_pay, "price_usd": round(plan.price, 6)}
    events.tell(events.BATCH_STARTED, output, told, flow=flow)
    began = asyncio.get_running_loop().time()
    outcome = "stopped"
    rows = plan.rows if plan is not None else 0
    try:
        async with (
            # Here already, because the summary links to gallery and result manifest.
            reported(session.report),
            moving_progress(batch, rows, _alarm(session, alert_above_usd, flow)),
        ):
            yield
        outcome = "stored" if batch.complete else "incomplete"
    finally:
        # A submit that is under way may yet turn out to be paid for.
        await asyncio.shield(session.submitter.drained())
        batch.spent = session.submitter.spent
        batch.seconds = asyncio.get_running_loop().time() - began
        ended = events.BATCH_FINISHED
        if suspends and outcome != "stopped" and batch.outstanding:
            outcome, ended = "submitted", events.BATCH_SUSPENDED
        counts = events.counts(batch)
        left = "yes" if session.submitter.outstanding else "no"
        events.tell(
            ended,
            output,
            {**told, **counts, "outcome": outcome},
            flow=flow,
            outcome=outcome,
            outstanding=left,
        )
        if batch.stored > batch.already_stored and (key := _asset_key(output)):
            events.tell_asset(key, counts)
        await show_summary(batch, folder, outcome, settings.public_urls)


def _alarm(session: Session, above: float | None, flow: str) -> Callable[[], None]:
    """What looks at the money now and then, and says once that it is more than a person wanted."""
    batch, told = session.rows.progress, False

    def tick() -> None:
        nonlocal told
        batch.spent = session.submitter.spent
        if above is not None and batch.spent > above and not told:
            told = True
            payload = {"output": batch.output, "spent": batch.spent, "above": above}
            events.tell(events.SPEND_ABOVE, batch.output, payload, flow=flow)

    return tick


async def tell_of_expiry(output: OutputFolder) -> None:
    """Emit an event where results that are paid for and not stored will soon be gone."""
    try:
        status = await ledger_status(ledger_store(output))
    except LedgerError:
        return  # the run has just told so itself
    soon = expiring(status.outstanding, FluxKontextSettings().result_days)
    if not soon:
        return
    first, left = min(soon, key=lambda told: told[1])
    payload = {
        "output": str(output),
        "rows": len(soon),
        "task_id": first.task.task_id,
        "days_left": round(left.total_seconds() / 86_400, 2),
    }
    events.tell(events.RESULTS_EXPIRING, str(output), payload, flow=_flow_name())


def _asset_key(output: str) -> str | None:
    """The output as the key of an asset, where it can be one."""
    try:
        return Asset(key=output).key
    except ValidationError:
        return None


def _flow_name() -> str:
    context = FlowRunContext.get()
    return context.flow.name if context is not None and context.flow is not None else "none"
