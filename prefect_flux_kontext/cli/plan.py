"""`flux-kontext plan`: what a run would do and cost."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from prefect_flux_kontext.cli.arguments import (
    add_manifest_arguments,
    manifest_from_options,
    row_options_from_options,
)

if TYPE_CHECKING:
    import argparse

    from prefect_flux_kontext.batch.planning import Plan
    from prefect_flux_kontext.batch.policy import RowOptions
    from prefect_flux_kontext.manifest.reader import Manifest
    from prefect_flux_kontext.manifest.row import RefusedRow
    from prefect_flux_kontext.storage.filesystem import OutputFolder

SOME_ROWS_INVALID = 1


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    plan = commands.add_parser(
        "plan",
        help="Show what a run would do and cost, and every invalid row",
        description="Show what a run would do and cost, and every invalid row. Sends no request "
        "to the service. Exit status: 0 all rows are valid, 1 some rows are invalid, 2 the "
        "manifest or the ledger cannot be read.",
    )
    add_manifest_arguments(plan)
    plan.set_defaults(func=lambda options: asyncio.run(_plan(options)))


async def show_plan(manifest: Manifest, output: OutputFolder, options: RowOptions) -> Plan:
    """Print every invalid row, then the plan, and return the plan.

    Raises:
        ManifestError: The manifest cannot be read to its end, or has no rows.
        LedgerError: The ledger cannot be read or is damaged.
    """
    from prefect_flux_kontext.batch.planning import make_plan
    from prefect_flux_kontext.ledger.store import open_ledger_store
    from prefect_flux_kontext.settings import FluxKontextSettings

    def print_refused(row: RefusedRow) -> None:
        print(f"  line {row.line}, {row.id!r:.80}: {row.reason}")

    settings = FluxKontextSettings()
    plan = await make_plan(
        manifest,
        open_ledger_store(output),
        options,
        prices=settings.prices(),
        requests_per_minute=settings.requests_per_minute,
        concurrent_tasks=settings.concurrent_tasks,
        on_refused=print_refused,
    )
    print(plan, flush=True)
    return plan


async def _plan(options: argparse.Namespace) -> int:
    row_options = row_options_from_options(options)
    plan = await show_plan(manifest_from_options(options), options.output, row_options)
    return SOME_ROWS_INVALID if plan.refused else 0
