"""The plan of a flow run: logged, and approved by a person on Prefect's own page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefect import get_run_logger
from prefect.flow_runs import apause_flow_run
from prefect.input import RunInput
from pydantic import Field

from prefect_flux_kontext.batch.planning import make_plan
from prefect_flux_kontext.errors import BatchStoppedError
from prefect_flux_kontext.ledger.store import open_ledger_store
from prefect_flux_kontext.settings import FluxKontextSettings

if TYPE_CHECKING:
    from prefect_flux_kontext.batch.planning import Plan
    from prefect_flux_kontext.batch.policy import RowOptions
    from prefect_flux_kontext.credentials import FluxKontextCredentials
    from prefect_flux_kontext.manifest.reader import Manifest
    from prefect_flux_kontext.storage.filesystem import OutputFolder

WAIT_SECONDS = 24 * 3600
LOOK_SECONDS = 5
_SHOWN = 16


async def plan_and_log(
    rows: Manifest, output: OutputFolder, account: FluxKontextCredentials, options: RowOptions
) -> Plan:
    """Make the plan and log it, with every invalid row that it has kept.

    Raises:
        ConfigurationError: The output cannot be written to.
        ManifestError: The manifest cannot be read to its end, or has no rows.
        LedgerError: The ledger cannot be read or is damaged.
    """
    # Else a wrong output would show as a ledger that cannot be read.
    await output.check_writable()
    plan = await build_plan(rows, output, account, options)
    logger = get_run_logger()
    if plan.problems:
        told = (f"line {row.line}, {row.id!r:.80}: {row.reason}" for row in plan.problems)
        logger.warning("Invalid rows:\n%s", "\n".join(told))
    logger.info("The plan:\n%s", plan)
    return plan


async def build_plan(
    rows: Manifest, output: OutputFolder, account: FluxKontextCredentials, options: RowOptions
) -> Plan:
    """Make the plan.

    Raises:
        ManifestError: The manifest cannot be read to its end, or has no rows.
        LedgerError: The ledger cannot be read or is damaged.
    """
    return await make_plan(
        rows,
        open_ledger_store(output),
        options,
        prices=FluxKontextSettings().prices(),
        requests_per_minute=account.requests_per_minute,
        concurrent_tasks=account.concurrent_tasks,
    )


class Approval(RunInput):
    """What a person says of a plan."""

    approve: bool = Field(default=False, description="Pay for this plan.")
    plan: str = Field(description="The plan that is meant. Leave it as it is.")


async def ask_for_approval(plan: Plan) -> None:
    """Pause the flow run until a person has approved this very plan, for a day at most.

    Raises:
        BatchStoppedError: It was not approved; nothing was submitted.
        FlowPauseTimeout: Nobody answered.
    """
    name = plan.digest[:_SHOWN]
    form = Approval.with_initial_data(
        description=f"Approve ${plan.price:,.2f} for {plan.to_pay:,} images?\n\n```\n{plan}\n```",
        approve=False,
        plan=name,
    )
    answer = await apause_flow_run(
        wait_for_input=form, timeout=WAIT_SECONDS, poll_interval=LOOK_SECONDS, key=name
    )
    if not answer.approve or answer.plan != name:
        raise BatchStoppedError("The plan was not approved, so nothing was submitted.")
