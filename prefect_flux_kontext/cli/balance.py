"""`flux-kontext balance`: the balance of the account, which also proves its key."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from prefect_flux_kontext.cli.arguments import add_json_argument
from prefect_flux_kontext.cli.display import print_json

if TYPE_CHECKING:
    import argparse


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    balance = commands.add_parser(
        "balance",
        help="Show the balance of the account; proves that the key is valid",
        description="Show the balance of the account that FLUX_KONTEXT_API_KEY and "
        "FLUX_KONTEXT_BASE_URL name. Exit status: 0 the key is valid, 2 it is not or the service "
        "cannot be reached.",
    )
    add_json_argument(balance)
    balance.set_defaults(func=lambda options: asyncio.run(_balance(as_json=options.json)))


async def _balance(*, as_json: bool) -> int:
    from prefect_flux_kontext.client.client import FluxKontextClient
    from prefect_flux_kontext.settings import FluxKontextSettings

    settings = FluxKontextSettings()
    async with FluxKontextClient(settings.require_api_key(), base_url=settings.base_url) as client:
        dollars = await client.balance()
    if as_json:
        print_json({"service": client.base_url, "balance_usd": dollars})
    else:
        print(f"${dollars:,.2f}  at {client.base_url}")
    return 0
