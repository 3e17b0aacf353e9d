"""`flux-kontext balance` and `styles`."""

from __future__ import annotations

import argparse
import textwrap

from prefect_flux_kontext.cli.display import print_json
from prefect_flux_kontext.cli.options import create_client
from prefect_flux_kontext.styles.styles import builtin_styles, read_styles

_WIDTH = 96


async def show_balance(options: argparse.Namespace) -> int:
    """Run `balance`."""
    async with create_client() as client:
        dollars = await client.balance()
    if options.json:
        print_json({"service": client.base_url, "balance_usd": dollars})
    else:
        print(f"${dollars:,.2f}  at {client.base_url}")
    return 0


def list_styles(options: argparse.Namespace) -> int:
    """Run `styles`."""
    styles = builtin_styles().values() if options.file is None else read_styles(options.file)
    for style in styles:
        parameters = ", ".join(f"{name} {value}" for name, value in style.parameters.items())
        print(f"{style.name}  ({parameters})" if parameters else style.name)
        print(textwrap.indent(textwrap.fill(style.prompt, _WIDTH), "    "))
    return 0
