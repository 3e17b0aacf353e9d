"""`flux-kontext deploy`, `announce`, `automations`, `limits`: commands that talk to Prefect."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands to the command line."""
    deploy = commands.add_parser(
        "deploy",
        help="Create the deployments of this package in Prefect",
        description="Create or update the seven deployments of this package in the Prefect at "
        "PREFECT_API_URL, for the work pool flux-kontext. Workers need the package and no "
        "checkout.",
    )
    deploy.add_argument(
        "manifest", metavar="MANIFEST", help="URL or absolute path that nightly-prefix restyles"
    )
    deploy.add_argument(
        "--output",
        dest="output_url",  # as in `announce`
        metavar="OUTPUT",
        required=True,
        help="folder or prefix for the images",
    )
    deploy.set_defaults(func=_deploy)

    announce = commands.add_parser(
        "announce",
        help="Announce a manifest to Prefect, so that a deployment runs it",
        description="Emit the event flux-kontext.manifest.arrived to the Prefect at "
        "PREFECT_API_URL. The deployment manifest-lands takes its parameters from this event.",
    )
    announce.add_argument("manifest", metavar="MANIFEST", help="URL or path of the manifest")
    announce.add_argument(
        "--output",
        # Another name than `output`: the event carries the text, and nothing opens the folder.
        dest="output_url",
        metavar="OUTPUT",
        required=True,
        help="folder or prefix for the images",
    )
    announce.add_argument(
        "--with",
        dest="payload",
        metavar="NAME=VALUE",
        action="append",
        type=_parse_pair,
        default=[],
        help="further value for the event's payload, for triggers of your own; can be repeated",
    )
    announce.set_defaults(func=_announce)

    automations = commands.add_parser(
        "automations",
        help="Create notification automations",
        description="Create or update three automations in the Prefect at PREFECT_API_URL. They "
        "notify when a batch fails, costs too much, or has results that will soon expire.",
    )
    automations.add_argument(
        "block", metavar="BLOCK", help="saved notification Block, such as slack-webhook/alerts"
    )
    automations.set_defaults(func=_automations)

    limits = commands.add_parser(
        "limits",
        help="Manage the concurrency limit that partitions of a batch share",
        description="Manage the limit in Prefect that holds the account's slots.",
    )
    actions = limits.add_subparsers(required=True, metavar="ACTION")
    create = actions.add_parser(
        "create",
        help="Create or update the limit",
        description="Create or update the global concurrency limit from which partitions of a "
        "batch lease the account's slots, in the Prefect at PREFECT_API_URL. The account's label "
        "(FLUX_KONTEXT_ACCOUNT) is part of its name, and the account's slots "
        "(FLUX_KONTEXT_CONCURRENT_TASKS) are its size.",
    )
    create.add_argument(
        "--credentials",
        metavar="NAME",
        help="saved credentials Block (default: the account of the environment)",
    )
    create.set_defaults(func=_create_limit)


def _parse_pair(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not name:
        # argparse turns this into its own message, with the option and the text.
        raise ValueError
    return name, value


def _deploy(options: argparse.Namespace) -> int:
    from prefect_flux_kontext.errors import ConfigurationError
    from prefect_flux_kontext.orchestration.events import require_api_url

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


def _announce(options: argparse.Namespace) -> int:
    from prefect_flux_kontext.orchestration.events import announce_manifest

    asyncio.run(announce_manifest(options.manifest, options.output_url, dict(options.payload)))
    print(f"Announced: {options.manifest}")
    return 0


def _automations(options: argparse.Namespace) -> int:
    from prefect_flux_kontext.orchestration.automations import create_automations

    for name in asyncio.run(create_automations(options.block)):
        print(name)
    return 0


def _create_limit(options: argparse.Namespace) -> int:
    from prefect_flux_kontext.credentials import resolve_credentials
    from prefect_flux_kontext.orchestration.events import require_api_url
    from prefect_flux_kontext.orchestration.partitions.leases import create_limit

    require_api_url()

    async def create() -> str:
        return await create_limit(await resolve_credentials(options.credentials))

    print(asyncio.run(create()))
    return 0
