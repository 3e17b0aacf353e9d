"""`flux-kontext sandbox`: an emulation of the service on loopback, to rehearse for $0."""

from __future__ import annotations

import argparse
import sys

from pydantic import ValidationError

from prefect_flux_kontext.sandbox.faults.handlers import describe_faults
from prefect_flux_kontext.sandbox.faults.plan import BadPlanError, load_plan
from prefect_flux_kontext.sandbox.server import serve
from prefect_flux_kontext.sandbox.settings import SandboxSettings

_GREETING = """\
Flux Kontext sandbox: {url}

  export FLUX_KONTEXT_BASE_URL={url}
  export FLUX_KONTEXT_API_KEY={key}

Bill:          {url}/sandbox/bill
Active faults: {url}/sandbox/faults
References:    {url}/references
Stop with Ctrl-C.
"""


def serve_sandbox(args: argparse.Namespace) -> int:
    """Run `sandbox`: serve until interrupted. The exit status is 2 if it could not start."""
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
