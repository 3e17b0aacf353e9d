"""A batch over many machines: its parts are flow runs of a deployment, watched to their ends.

Every part leases its block of the account's slots. What a part leaves, because its worker was
killed or never came, another run of it does, or in the end the batch itself.
"""

from __future__ import annotations

import asyncio
import math
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext

from prefect_flux_kontext.artifacts import moving_progress
from prefect_flux_kontext.batch.budget import check_alone
from prefect_flux_kontext.batch.session import ledger_store
from prefect_flux_kontext.batch.standing import Standing
from prefect_flux_kontext.batch.summary import BatchSummary
from prefect_flux_kontext.ledger.owners import living_owner
from prefect_flux_kontext.models import utc_now
from prefect_flux_kontext.parts.leases import leased
from prefect_flux_kontext.parts.part import Part
from prefect_flux_kontext.parts.watching import PartRuns, end, watch
from prefect_flux_kontext.plans import plan_of
from prefect_flux_kontext.running import Earlier, spend_alarm, tell_started

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from prefect_flux_kontext.batch.options import RowOptions
    from prefect_flux_kontext.batch.planning import Plan
    from prefect_flux_kontext.batch.waves import Wave
    from prefect_flux_kontext.credentials import FluxKontextCredentials
    from prefect_flux_kontext.manifest.reading import Manifest
    from prefect_flux_kontext.parts.cutting import Cut
    from prefect_flux_kontext.parts.leases import Lease
    from prefect_flux_kontext.storage import OutputFolder


@dataclass(frozen=True)
class Rest:
    """What is left to the batch itself, when its parts have ended.

    Attributes:
        account: The account, as it may be used.
        options: What a person has decided about its rows.
        earlier: What the parts have come to; None where there were none.
        alert_above_usd: Dollars above which an event still is to say so.
        lease: The slots that are held for it.
    """

    account: FluxKontextCredentials
    options: RowOptions
    alert_above_usd: float | None
    earlier: Earlier | None = None
    lease: Lease | None = None


@asynccontextmanager
async def in_parts(
    wanted: Cut | None,
    plan: Plan,
    rows: Manifest,
    output: OutputFolder,
    account: FluxKontextCredentials,
    options: RowOptions,
    alert_above_usd: float | None,
) -> AsyncIterator[Rest]:
    """Run a batch's parts to their ends, and yield what is left to the batch itself.

    Args:
        wanted: How it is cut; None for a batch in one piece.
        plan: What is to be done.
        rows: The manifest.
        output: Its output.
        account: Who pays.
        options: What a person has decided about its rows.
        alert_above_usd: Dollars spent above which an event says so.

    Raises:
        ConfigurationError: There is a budget, and another run is paying into the output.
        LedgerError: The ledger cannot be read or written.
    """
    if wanted is None:
        yield Rest(account, options, alert_above_usd)
        return
    began, since = asyncio.get_running_loop().time(), utc_now()
    tell_started(str(output), plan)
    total = BatchSummary(output=str(output))
    alarm = spend_alarm(total, lambda: total.spent, alert_above_usd)
    if plan.to_pay:
        await _run(_parts(wanted, plan, options), wanted, output, options, total, plan, alarm)
    left = await plan_of(rows, output, account, options)
    total.spent = round(left.spent - plan.spent, 6)
    alarm()
    told = alert_above_usd is not None and total.spent > alert_above_usd
    rest = Rest(
        wanted.share.of(account),
        replace(options, since=since),
        None if told else alert_above_usd,
        Earlier(total.spent, asyncio.get_running_loop().time() - began),
    )
    if left.to_pay or left.standings[Standing.OWED] or left.standings[Standing.UNKNOWN]:
        get_run_logger().info("What the parts have left:\n%s", left)
        async with leased(account, wanted.share.slots) as lease:
            yield replace(rest, lease=lease)
    else:
        yield rest


async def run_rest(wave: Wave) -> BatchSummary:
    """Run a wave of what parts have left; most have nothing left, and are no task run."""
    return await wave.run()


def _parts(wanted: Cut, plan: Plan, options: RowOptions) -> list[Part]:
    number = min(wanted.parts, plan.to_pay)
    budget = None
    if options.budget_usd is not None:
        left = max(0.0, options.budget_usd - plan.spent)
        budget = math.floor(left / number * 1_000_000) / 1_000_000
    slots, requests = wanted.share
    return [
        Part(
            number=each,
            of=number,
            slots=slots,
            requests_per_minute=requests,
            budget_usd=budget,
        )
        for each in range(1, number + 1)
    ]


async def _run(
    parts: list[Part],
    wanted: Cut,
    output: OutputFolder,
    options: RowOptions,
    total: BatchSummary,
    plan: Plan,
    alarm: Callable[[], None],
) -> None:
    store = ledger_store(output)
    context = FlowRunContext.get()
    name = context.flow_run.name if context is not None and context.flow_run else "batch"
    async with living_owner(store) as owner, get_client() as client:
        if options.budget_usd is not None:
            await check_alone(store, owner)
        running = [PartRuns(client, store, part, wanted, name) for part in parts]
        try:
            for part in running:
                await part.start()
            async with moving_progress(total, plan.rows, alarm):
                await watch(running, total)
        finally:
            await asyncio.shield(end(running))
