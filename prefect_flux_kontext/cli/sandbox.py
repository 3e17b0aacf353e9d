"""`flux-kontext sandbox`: an emulation of the service on loopback, to rehearse for $0."""

from __future__ import annotations

import sys
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from prefect_flux_kontext.sandbox.settings import SandboxSettings

if TYPE_CHECKING:
    import argparse

_GREETING = """\
Flux Kontext sandbox: {url}

  export FLUX_KONTEXT_BASE_URL={url}
  export FLUX_KONTEXT_API_KEY={key}

Bill:          {url}/sandbox/bill
Active faults: {url}/sandbox/faults
References:    {url}/references
Stop with Ctrl-C.
"""

_METAVARS = {
    "mean": "SECONDS",
    "spread": "SHARE",
    "fail_rate": "SHARE",
    "api_key": "KEY",
    "price_pro": "USD",
    "price_pro_official": "USD",
    "price_max": "USD",
    "price_max_official": "USD",
    "balance": "USD",
    "result_lifetime": "SECONDS",
    "references": "FOLDER",
    "fetch_timeout": "SECONDS",
    "long_edge": "PIXELS",
    "callback_timeout": "SECONDS",
    "callback_delay_scale": "FACTOR",
}
"""What the values of options are; all others are numbers, `N`."""

_DAY_SECONDS = 86_400


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line, with one option for each setting."""
    parser = subparsers.add_parser(
        "sandbox",
        help="Serve the Flux Kontext API on loopback, to rehearse for $0",
        description="Serve the whole Flux Kontext API on loopback, so that batches can be "
        "rehearsed for $0. The sandbox really restyles the reference images.",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: %(default)s)"
    )
    parser.add_argument(
        "--port",
        type=int,
        default=8765,
        help="port to listen on; 0 takes a free one (default: %(default)s)",
    )
    for name, field in SandboxSettings.model_fields.items():
        # The options come from the settings, so that both always agree. The text that is given
        # stays a text here: pydantic converts and checks it.
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            metavar=_METAVARS.get(name, "N"),
            help=f"{field.description}{_format_default(name, field.default)}",
        )
    parser.add_argument(
        "--fault",
        action="append",
        default=[],
        metavar="KIND:FAULT=SHARE@FIRST-LAST",
        help="inject a fault, such as submit:lost-reply=0.02; can be repeated; `--fault help` "
        "lists all faults",
    )
    parser.add_argument(
        "--faults", type=Path, metavar="FILE", help="inject the faults of a JSON or YAML plan"
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Serve until interrupted.

    Returns:
        0 after a clean stop, 2 if the sandbox could not start.
    """
    # Imported here because they are slow to import.
    from prefect_flux_kontext.sandbox.faults.handlers import describe_faults
    from prefect_flux_kontext.sandbox.faults.plan import BadPlanError, load_plan
    from prefect_flux_kontext.sandbox.server import serve

    if "help" in args.fault:
        print(describe_faults())
        return 0
    given = {name: getattr(args, name) for name in SandboxSettings.model_fields}
    try:
        settings = SandboxSettings.model_validate(
            {name: value for name, value in given.items() if value is not None}
        )
    except ValidationError as invalid:
        first = invalid.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        print(f"flux-kontext sandbox: --{option}: {first['msg']}", file=sys.stderr)
        return 2

    try:
        plan = load_plan(args.faults, args.fault, settings.seed)
    except BadPlanError as error:
        print(f"flux-kontext sandbox: --fault: {error}", file=sys.stderr)
        return 2

    def announce(url: str) -> None:
        print(_GREETING.format(url=url, key=settings.api_key or "sandbox"), flush=True)

    try:
        serve(settings, args.host, args.port, announce, plan)
    except OSError as error:
        address = f"{args.host}:{args.port}"
        print(f"flux-kontext sandbox: cannot listen on {address}: {error}", file=sys.stderr)
        return 2
    return 0


def _format_default(name: str, default: Any) -> str:
    """Return the remark on a default; the descriptions of options that are off have their own."""
    if not isinstance(default, int | float | Decimal):
        return ""
    number = f"{default:f}".rstrip("0").rstrip(".") if isinstance(default, float) else f"{default}"
    days, rest = divmod(default, _DAY_SECONDS)
    if _METAVARS.get(name) == "SECONDS" and days and not rest:
        return f" (default: {number}, which is {days:g} days)"
    return f" (default: {number})"
