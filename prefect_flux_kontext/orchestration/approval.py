"""The plan of a flow run: how it is made, logged, and approved on the page of the flow run."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote
from uuid import UUID

from prefect import get_client, get_run_logger
from prefect.artifacts import acreate_markdown_artifact
from prefect.flow_runs import apause_flow_run
from prefect.runtime import flow_run

from prefect_flux_kontext.batch.pilot import select_rows
from prefect_flux_kontext.batch.planning import Plan, make_plan
from prefect_flux_kontext.batch.runner import run_batch
from prefect_flux_kontext.errors import BatchStoppedError
from prefect_flux_kontext.ledger.store import open_ledger_store
from prefect_flux_kontext.manifest.row import Row
from prefect_flux_kontext.orchestration.batch_run import open_batch, run_wave
from prefect_flux_kontext.orchestration.partitions.leases import check_limit
from prefect_flux_kontext.orchestration.run_page import build_artifact_key, read_run_sheet
from prefect_flux_kontext.redaction import is_plain_url
from prefect_flux_kontext.settings import FluxKontextSettings

if TYPE_CHECKING:
    from prefect_flux_kontext.batch.policy import RowOptions
    from prefect_flux_kontext.credentials import FluxKontextCredentials
    from prefect_flux_kontext.manifest.reader import Manifest
    from prefect_flux_kontext.storage.filesystem import OutputFolder

APPROVAL_TIMEOUT_SECONDS = 24 * 3600

APPROVAL_POLL_SECONDS = 5
"""Between two requests to Prefect's API for the answer."""

_MAX_REFERENCES_SHOWN = 6


class Batch(NamedTuple):
    """What a flow run makes, where it stores the images, and who pays."""

    rows: Manifest
    output: OutputFolder
    account: FluxKontextCredentials
    options: RowOptions
    account_limit: str | None = None


async def plan_and_log(batch: Batch, pilot: int | None = None) -> Plan:
    """Make the plan and log it, with the invalid rows that it lists.

    Raises:
        ConfigurationError: The output cannot be written to, or the limit cannot be used.
        ManifestError: The manifest cannot be read to the end, or has no rows.
        LedgerError: The ledger cannot be read or is damaged.
    """
    # Without this check, a wrong output would be reported as an unreadable ledger.
    await batch.output.check_writable()
    if batch.account_limit is not None:
        await check_limit(batch.account, batch.account_limit)
    plan = await build_plan(batch, pilot)
    logger = get_run_logger()
    if plan.problems:
        logger.warning("Invalid rows:\n%s", "\n".join(plan.describe_problems()))
    logger.info("Plan:\n%s", plan)
    return plan


async def build_plan(batch: Batch, pilot: int | None = None) -> Plan:
    """Make the plan, and ask for the balance of the account."""
    account = batch.account
    plan = await make_plan(
        batch.rows,
        open_ledger_store(batch.output),
        batch.options,
        prices=FluxKontextSettings().prices(),
        requests_per_minute=account.requests_per_minute,
        concurrent_tasks=account.concurrent_tasks,
        pilot=pilot,
    )
    async with account.get_client() as client:
        plan.balance = await client.find_balance()
    return plan


async def ask_for_approval(plan: Plan, batch: Batch, sheet: str | None = None) -> bool:
    """Pause the flow run for a day at most; return False if a person cancels, True if one resumes.

    The plan is made again after the approval, because the manifest or the ledger may have changed
    in the meantime.

    Raises:
        BatchStoppedError: The plan has changed; nothing was submitted.
        FlowPauseTimeout: Nobody answered.
    """
    title = f"Resume to pay ${plan.price:,.2f} for {plan.to_pay:,} images; cancel to decline"
    shown = (
        f"![pilot]({sheet})" if sheet else await asyncio.to_thread(_show_references, batch.rows)
    )
    await acreate_markdown_artifact(
        f"# {title}\n\n```\n{plan}\n```\n\n{shown}",
        build_artifact_key(str(batch.output), "plan"),
        title,
    )
    get_run_logger().warning("%s.", title)
    resuming = asyncio.create_task(
        apause_flow_run(
            timeout=APPROVAL_TIMEOUT_SECONDS, poll_interval=APPROVAL_POLL_SECONDS, key=plan.digest
        )
    )
    # Prefect's own wait does not end when the flow run is cancelled.
    cancelled = asyncio.create_task(_wait_until_cancelled())
    try:
        await asyncio.wait({resuming, cancelled}, return_when=asyncio.FIRST_COMPLETED)
        if cancelled.done():
            return False
        await resuming
    finally:
        resuming.cancel()
        cancelled.cancel()
    if (await plan_and_log(batch)).digest != plan.digest:
        raise BatchStoppedError(
            "The plan has changed since it was approved, so nothing was submitted. Run the batch "
            "again to approve the new plan."
        )
    return True


async def run_pilot(plan: Plan, batch: Batch) -> str | None:
    """Run the sample of a plan, and return its contact sheet as a `data:` URL, if there is one."""
    options = replace(batch.options, deferred=False)
    async with open_batch(
        batch.output, batch.account, options, plan, account_limit=batch.account_limit
    ) as (session, slots):
        sample = select_rows(batch.rows.rows(), plan.pilot)
        summary = await run_batch(session, sample, run_wave, concurrent_tasks=slots)
    get_run_logger().info("Pilot: %s.", summary)
    return await read_run_sheet(batch.output, session.ledger.owner)


async def _wait_until_cancelled() -> None:
    async with get_client() as client:
        while True:
            await asyncio.sleep(APPROVAL_POLL_SECONDS)
            run = await client.read_flow_run(UUID(flow_run.id))
            if run.state and (run.state.is_cancelling() or run.state.is_cancelled()):
                return


def _show_references(rows: Manifest) -> str:
    """Return the first references as Markdown images, where a browser finds them."""
    first = itertools.islice(rows.rows(), _MAX_REFERENCES_SHOWN)
    urls = [url for row in first if isinstance(row, Row) for url in row.request.image_urls]
    # Prefect would keep the signature of a URL.
    return " ".join(f"![]({quote(url, safe=':/%')})" for url in urls if is_plain_url(url))
