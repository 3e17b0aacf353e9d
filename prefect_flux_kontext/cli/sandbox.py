"""`flux-kontext sandbox`: the service on loopback, to rehearse for $0."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from prefect_flux_kontext.sandbox.settings import SandboxSettings

if TYPE_CHECKING:
    import argparse

_GREETING = """\
Flux Kontext sandbox: {url}

  export FLUX_KONTEXT_BASE_URL={url}
  export FLUX_KONTEXT_API_KEY={key}

What was paid: {url}/sandbox/bill
The weather:   {url}/sandbox/faults
References:    {url}/references
Stop with Ctrl-C.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Registers `sandbox`, with one option for each setting."""
    parser = subparsers.add_parser(
        "sandbox",
        help="serve the Flux Kontext API on loopback, to rehearse for $0",
        description="Serves the whole Flux Kontext API on loopback and really restyles the "
        "reference images, so that batches can be rehearsed for $0.",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: %(default)s)"
    )
    parser.add_argument(
        "--port", type=int, default=8765, help="port, 0 for a free one (default: %(default)s)"
    )
    for name, field in SandboxSettings.model_fields.items():
        # Read from the settings, so that both always agree; pydantic converts the text.
        default = "" if "(without it" in str(field.description) else f" (default: {field.default})"
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            metavar=name.rsplit("_", 1)[-1].upper(),
            help=f"{field.description}{default}",
        )
    parser.add_argument(
        "--fault",
        action="append",
        default=[],
        metavar="KIND:FAULT=SHARE@FIRST-LAST",
        help="a fault on demand, such as submit:lost-reply=0.02; can be repeated; "
        "`--fault help` lists them",
    )
    parser.add_argument(
        "--faults", type=Path, metavar="FILE", help="a plan of faults, JSON or YAML"
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Serves until it is interrupted.

    Returns:
        0 after a clean stop, 2 when it could not start.
    """
    # Slow to import.
    from prefect_flux_kontext.sandbox.faults.plan import BadPlanError, load_plan
    from prefect_flux_kontext.sandbox.faults.registry import described
    from prefect_flux_kontext.sandbox.server import serve

    if "help" in args.fault:
        print(described())
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
