"""`flux-kontext announce`, `automations` and `limits`: commands that talk to a Prefect server."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands to the command line."""
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
