"""`flux-kontext announce` and `automations`: what Prefect is told, and whom it tells."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands to the command line."""
    announce = commands.add_parser(
        "announce",
        help="tell Prefect that a manifest is there, so that a deployment runs it",
        description="Emit the event flux-kontext.manifest.arrived to the Prefect that "
        "PREFECT_API_URL names. The deployment manifest-lands takes its parameters from it.",
    )
    announce.add_argument("manifest", metavar="MANIFEST", help="URL or path of the manifest")
    announce.add_argument(
        "--output",
        dest="place",
        metavar="OUTPUT",
        required=True,
        help="where its images are to go",
    )
    announce.add_argument(
        "--with",
        dest="payload",
        metavar="NAME=VALUE",
        action="append",
        type=_pair,
        default=[],
        help="more for the event's payload, which a trigger of yours may use",
    )
    announce.set_defaults(func=_announce)

    automations = commands.add_parser(
        "automations",
        help="have people told when a batch fails, costs too much or loses results",
        description="Create, or bring up to date, three automations in the Prefect that "
        "PREFECT_API_URL names.",
    )
    automations.add_argument(
        "block", metavar="BLOCK", help="a saved notification Block, such as slack-webhook/alerts"
    )
    automations.set_defaults(func=_automations)


def _pair(text: str) -> tuple[str, str]:
    name, found, value = text.partition("=")
    if not found or not name:
        raise ValueError
    return name, value


def _announce(options: argparse.Namespace) -> int:
    from prefect_flux_kontext.orchestration.events import announce_manifest

    asyncio.run(announce_manifest(options.manifest, options.place, dict(options.payload)))
    print(f"Announced: {options.manifest}")
    return 0


def _automations(options: argparse.Namespace) -> int:
    from prefect_flux_kontext.orchestration.automations import create_automations

    for name in asyncio.run(create_automations(options.block)):
        print(name)
    return 0
