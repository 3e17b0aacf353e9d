"""`flux-kontext plan`: what a run would do and cost."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from prefect_flux_kontext.cli.arguments import (
    add_display_arguments,
    add_manifest_arguments,
    manifest_from_options,
    row_options_from_options,
)
from prefect_flux_kontext.cli.display import print_json, print_text

if TYPE_CHECKING:
    import argparse

    from prefect_flux_kontext.batch.planning import Plan
    from prefect_flux_kontext.batch.policy import RowOptions
    from prefect_flux_kontext.manifest.reader import Manifest
    from prefect_flux_kontext.storage.filesystem import OutputFolder

SOME_ROWS_INVALID = 1


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    plan = commands.add_parser(
        "plan",
        usage="%(prog)s [OPTION …] MANIFEST OUTPUT",
        help="Show what a run would do and cost, and the invalid rows",
        description="Show what a run would do and cost, and the invalid rows. Asks the "
        "service only for the balance of the account. Exit status: 0 all rows are valid, 1 some "
        "rows are invalid, 2 the manifest or the ledger cannot be read.",
    )
    add_manifest_arguments(plan)
    add_display_arguments(plan)
    plan.set_defaults(func=lambda options: asyncio.run(_plan(options)))


async def build_plan(
    manifest: Manifest,
    output: OutputFolder,
    options: RowOptions,
    limit: int | None,
    pilot: int | None = None,
) -> Plan:
    """Make the plan with the account of the environment, and ask for its balance.

    Raises:
        ManifestError: The manifest cannot be read to its end, or has no rows.
        LedgerError: The ledger cannot be read or is damaged.
    """
    from prefect_flux_kontext.batch.planning import make_plan
    from prefect_flux_kontext.client.client import FluxKontextClient
    from prefect_flux_kontext.ledger.store import open_ledger_store
    from prefect_flux_kontext.settings import FluxKontextSettings

    settings = FluxKontextSettings()
    plan = await make_plan(
        manifest,
        open_ledger_store(output),
        options,
        prices=settings.prices(),
        requests_per_minute=settings.requests_per_minute,
        concurrent_tasks=settings.concurrent_tasks,
        limit=limit,
        pilot=pilot,
    )
    if settings.api_key is not None:
        async with FluxKontextClient(
            settings.api_key,
            base_url=settings.base_url,
            requests_per_minute=settings.requests_per_minute,
            concurrent_tasks=settings.concurrent_tasks,
        ) as client:
            plan.balance = await client.find_balance()
    return plan


def plan_as_json(plan: Plan, output: OutputFolder) -> dict[str, Any]:
    """Return the plan in the form that docs/json.md describes."""
    from prefect_flux_kontext.batch.index import PlannedAction

    return {
        "manifest": plan.url,
        "output": str(output),
        "rows": plan.rows,
        "run_rows": plan.run_rows,
        "skipped_files": plan.skipped_files,
        "invalid": plan.refused,
        "duplicates": plan.duplicates,
        "to_pay": plan.to_pay,
        "stored": plan.actions[PlannedAction.STORED],
        "outstanding": plan.actions[PlannedAction.OUTSTANDING],
        "unknown": plan.actions[PlannedAction.UNKNOWN],
        "failed": plan.actions[PlannedAction.FAILED],
        "images": [
            {"mode": mode, "provider": provider, "images": images}
            for (mode, provider), images in sorted(plan.routes.items())
        ],
        "price_usd": round(plan.price, 6),
        "spent_usd": round(plan.spent, 6),
        "budget_usd": plan.budget,
        "balance_usd": plan.balance,
        "budgets": [
            {
                "column": column,
                "value": value,
                "budget_usd": dollars,
                "spent_usd": round(spent, 6),
                "price_usd": round(price, 6),
            }
            for column, value, dollars, spent, price in plan.list_budgets()
        ],
        "seconds": plan.seconds,
        "digest": plan.digest,
        "problems": [
            {"line": row.line, "id": row.id, "reason": row.reason} for row in plan.problems
        ],
    }


async def _plan(options: argparse.Namespace) -> int:
    row_options = row_options_from_options(options)
    manifest = manifest_from_options(options)
    plan = await build_plan(manifest, options.output, row_options, options.limit)
    if options.json:
        print_json(plan_as_json(plan, options.output))
    else:
        for line in plan.describe_problems():
            print_text(line)
        if not options.quiet:
            print_text(str(plan))
    return SOME_ROWS_INVALID if plan.refused else 0
