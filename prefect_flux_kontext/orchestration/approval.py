"""The plan of a flow run: how it is made, logged, and approved on the page of the flow run."""

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

APPROVAL_TIMEOUT_SECONDS = 24 * 3600

APPROVAL_POLL_SECONDS = 5
"""Between two requests to Prefect's API for the answer."""

_DIGEST_LENGTH = 16
"""Characters of a plan's digest that the form shows."""


async def plan_and_log(
    rows: Manifest, output: OutputFolder, account: FluxKontextCredentials, options: RowOptions
) -> Plan:
    """Make the plan and log it, with the invalid rows that it lists.

    Raises:
        ConfigurationError: The output cannot be written to.
        ManifestError: The manifest cannot be read to the end, or has no rows.
        LedgerError: The ledger cannot be read or is damaged.
    """
    # Without this check, a wrong output would be reported as an unreadable ledger.
    await output.check_writable()
    plan = await build_plan(rows, output, account, options)
    logger = get_run_logger()
    if plan.problems:
        logger.warning("Invalid rows:\n%s", "\n".join(plan.describe_problems()))
    logger.info("Plan:\n%s", plan)
    return plan


async def build_plan(
    rows: Manifest, output: OutputFolder, account: FluxKontextCredentials, options: RowOptions
) -> Plan:
    """Make the plan.

    Raises:
        ManifestError: The manifest cannot be read to the end, or has no rows.
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
    """The answer to a request for approval."""

    approve: bool = Field(default=False, description="Pay for this plan.")
    plan: str = Field(description="The digest of the plan. Do not change it.")


async def ask_for_approval(
    plan: Plan,
    rows: Manifest,
    output: OutputFolder,
    account: FluxKontextCredentials,
    options: RowOptions,
) -> None:
    """Pause the flow run until a person approves exactly this plan, for a day at most.

    The plan is made again after the approval, because the manifest or the ledger may have changed
    in the meantime.

    Raises:
        BatchStoppedError: The plan was not approved or has changed; nothing was submitted.
        FlowPauseTimeout: Nobody answered.
    """
    name = plan.digest[:_DIGEST_LENGTH]
    form = Approval.with_initial_data(
        description=f"Approve ${plan.price:,.2f} for {plan.to_pay:,} images?\n\n```\n{plan}\n```",
        approve=False,
        plan=name,
    )
    answer = await apause_flow_run(
        wait_for_input=form,
        timeout=APPROVAL_TIMEOUT_SECONDS,
        poll_interval=APPROVAL_POLL_SECONDS,
        key=name,
    )
    if not answer.approve or answer.plan != name:
        raise BatchStoppedError("The plan was not approved, so nothing was submitted.")
    if (await plan_and_log(rows, output, account, options)).digest != plan.digest:
        raise BatchStoppedError(
            "The plan has changed since it was approved, so nothing was submitted. Run the batch "
            "again to approve the new plan."
        )
