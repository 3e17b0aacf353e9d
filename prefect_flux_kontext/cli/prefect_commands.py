"""`flux-kontext deploy`, `announce`, `automations`, `limits`: commands that talk to Prefect."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from importlib.resources import as_file, files
from pathlib import Path

from prefect_flux_kontext.credentials import resolve_credentials
from prefect_flux_kontext.errors import ConfigurationError
from prefect_flux_kontext.orchestration.automations import create_automations
from prefect_flux_kontext.orchestration.events import announce_manifest, require_api_url
from prefect_flux_kontext.orchestration.partitions.leases import create_limit


def deploy(options: argparse.Namespace) -> int:
    """Run `deploy`."""
    require_api_url()
    locations = {"INCOMING": options.manifest, "RESTYLED": options.output_url}
    # A colon is part of a URL and of `block:s3-bucket/NAME`.
    relative = [
        text for text in locations.values() if ":" not in text and not Path(text).is_absolute()
    ]
    if relative:
        raise ConfigurationError(
            f"Workers run in a folder of their own: give {', '.join(relative)} as a URL or an "
            "absolute path. Nothing was deployed."
        )
    with as_file(files("prefect_flux_kontext") / "prefect.yaml") as path:
        command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
        command += ["--prefect-file", str(path)]
        return subprocess.run(command, env=os.environ | locations, check=False).returncode


async def announce(options: argparse.Namespace) -> int:
    """Run `announce`."""
    await announce_manifest(options.manifest, options.output_url, dict(options.payload))
    print(f"Announced: {options.manifest}")
    return 0


async def notify(options: argparse.Namespace) -> int:
    """Run `automations`."""
    for name in await create_automations(options.block):
        print(name)
    return 0


async def limit_slots(options: argparse.Namespace) -> int:
    """Run `limits create`."""
    require_api_url()
    print(await create_limit(await resolve_credentials(options.credentials)))
    return 0
