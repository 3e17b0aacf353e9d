"""From an accepted task to its images in their place, with what took how long."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from prefect_flux_kontext.api.waiting import wait_until_ended
from prefect_flux_kontext.ledger.records import Times
from prefect_flux_kontext.models import utc_now
from prefect_flux_kontext.results import persist_result

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from prefect_flux_kontext.api.cadence import PollingCadence
    from prefect_flux_kontext.api.client import FluxKontextClient
    from prefect_flux_kontext.api.connections import Connections
    from prefect_flux_kontext.batch.deferral import Deferral
    from prefect_flux_kontext.callbacks.mode import CallbackMode
    from prefect_flux_kontext.ledger.records import Entry
    from prefect_flux_kontext.manifest.rows import Row
    from prefect_flux_kontext.models import StoredImage
    from prefect_flux_kontext.report.pictures import Pictures
    from prefect_flux_kontext.storage import OutputFolder

_IMAGES_IN_HAND = 64
"""Images that are downloaded, checked or stored at once: more would only fill the memory."""


def storing(
    client: FluxKontextClient,
    http: Connections,
    output: OutputFolder,
    pictures: Pictures,
    called: CallbackMode,
    deferral: Deferral,
    cadence: PollingCadence,
    *,
    ai_mark: bool,
) -> Callable[[Row, Entry], Awaitable[tuple[list[StoredImage], Times]]]:
    """What waits for a row's accepted task to end and stores its images.

    Args:
        client: The service.
        http: For downloads.
        output: Where the images go.
        pictures: Keeps small ones for the gallery.
        called: Tells what callbacks say.
        deferral: Ends waits that are left to be collected.
        cadence: When to ask how a task is doing.
        ai_mark: Whether images are marked as made by AI.
    """
    room = asyncio.Semaphore(_IMAGES_IN_HAND)

    async def store(row: Row, entry: Entry) -> tuple[list[StoredImage], Times]:
        task = entry.task
        pictures.want_references(row.request.image_urls)
        async with deferral.waiting(row):
            result = await wait_until_ended(client, task, cadence, called.pauses(entry, cadence))
        called.ended(entry)
        waited = max(0.0, (utc_now() - task.submitted_at).total_seconds())
        loop = asyncio.get_running_loop()
        async with room:
            began = loop.time()
            images = await persist_result(
                result,
                output,
                http,
                name=row.name,
                key=entry.key,
                ai_mark=ai_mark,
                show=pictures.showing(entry.key),
            )
            downloaded = loop.time() - began
        return images, Times(result.completed_at, result.generation_seconds, waited, downloaded)

    return store
