"""`flux-kontext limits create`: the account's slots, for batches in partitions to share."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    limits = commands.add_parser(
        "limits", help="the account's slots as a limit in Prefect, for batches in partitions"
    )
    kinds = limits.add_subparsers(required=True, metavar="WHAT")
    create = kinds.add_parser(
        "create",
        help="create the limit, or bring it up to date",
        description="Create the global concurrency limit from which partitions of a batch lease "
        "the account's slots, in the Prefect that PREFECT_API_URL names. Its name has the "
        "account's label in it (FLUX_KONTEXT_ACCOUNT), its size is the account's "
        "(FLUX_KONTEXT_CONCURRENT_TASKS).",
    )
    create.add_argument(
        "--credentials", metavar="NAME", help="a saved account, in place of the environment's"
    )
    create.set_defaults(func=_create)


def _create(options: argparse.Namespace) -> int:
    from prefect_flux_kontext.credentials import resolve_credentials
    from prefect_flux_kontext.orchestration.events import require_api_url
    from prefect_flux_kontext.orchestration.partitions.leases import create_limit

    require_api_url()

    async def create() -> str:
        return await create_limit(await resolve_credentials(options.credentials))

    print(asyncio.run(create()))
    return 0
