"""`flux-kontext gallery`: the result manifest and the gallery of an output, made anew."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    gallery = commands.add_parser(
        "gallery",
        help="make the gallery of a batch anew",
        description="Bring OUTPUT/results.jsonl up to date with what ended runs have left, and "
        "make OUTPUT/gallery.html anew, with a picture of each image that is there. Asks the "
        "service nothing.",
    )
    gallery.add_argument("output", metavar="OUTPUT", help="the batch's output")
    gallery.set_defaults(func=lambda options: asyncio.run(_gallery(options.output)))


async def _gallery(output: str) -> int:
    from prefect_flux_kontext.errors import ConfigurationError
    from prefect_flux_kontext.ledger.heartbeat import keep_heartbeat
    from prefect_flux_kontext.ledger.store import open_ledger_store
    from prefect_flux_kontext.report.builder import bring_up_to_date
    from prefect_flux_kontext.report.gallery.builder import GALLERY
    from prefect_flux_kontext.report.gallery.thumbnails import ThumbnailStore
    from prefect_flux_kontext.settings import FluxKontextSettings
    from prefect_flux_kontext.storage.filesystem import OutputFolder

    folder = OutputFolder(output)
    store = open_ledger_store(folder)
    most = FluxKontextSettings().gallery_images
    if not most:
        raise ConfigurationError("FLUX_KONTEXT_GALLERY_IMAGES is 0, so there is no gallery.")
    async with keep_heartbeat(store) as run:
        rows = await bring_up_to_date(
            folder, store, run, ThumbnailStore(folder), most=most, missing=most
        )
    if not rows:
        raise ConfigurationError(
            f"No run has written results to {folder}. Run its manifest again: what is stored "
            "already costs nothing."
        )
    print(f"{rows:,} rows\n{folder.uri(GALLERY)}")
    return 0
