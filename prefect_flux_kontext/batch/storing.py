"""Waiting for an accepted row's result, and storing its images."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING

from prefect_flux_kontext.client.polling import wait_until_ended
from prefect_flux_kontext.errors import DownloadError, FluxKontextError, RefusedError
from prefect_flux_kontext.images.persist import persist_result
from prefect_flux_kontext.ledger.records import Times
from prefect_flux_kontext.models import utc_now
from prefect_flux_kontext.telemetry import measure_storing

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL import Image

    from prefect_flux_kontext.batch.session import Session
    from prefect_flux_kontext.ledger.records import Entry
    from prefect_flux_kontext.manifest.row import Row
    from prefect_flux_kontext.models import StoredImage

EXPIRED = "expired"
"""The code of a result that the service no longer keeps."""


@measure_storing
async def store_result(
    session: Session, row: Row, entry: Entry
) -> tuple[list[StoredImage], Times]:
    """Wait until the row's accepted task has ended, and store its images.

    Raises:
        GenerationFailedError: The task failed.
        FluxKontextError: The images are not stored. The code is `EXPIRED` if the service no longer
            keeps them, and `PENDING_COLLECTION` if they are left for a later collection.
    """
    task = entry.task
    ended_at = task.submitted_at
    session.report.pictures.request_reference(row.request.image_urls)
    loop = asyncio.get_running_loop()
    try:
        async with session.deferral.limit_wait(row):
            pauses = session.callbacks.pauses(entry, session.options.cadence)
            result = await wait_until_ended(session.client, task, session.options.cadence, pauses)
        session.callbacks.mark_ended(entry)
        # The service's time counts: this machine's clock may have been wrong at the submit.
        ended_at = result.completed_at or ended_at
        waited = max(0.0, (utc_now() - task.submitted_at).total_seconds())
        async with session.images_in_memory:
            began = loop.time()
            images = await persist_result(
                result,
                session.output,
                session.http,
                name=row.name,
                key=entry.key,
                ai_mark=session.settings.ai_mark,
                find_flags=_create_inspection(session, row, entry),
            )
            downloaded = loop.time() - began
    except (DownloadError, RefusedError) as error:
        days = session.options.result_days
        if ended_at + timedelta(days=days) > utc_now():
            raise
        raise FluxKontextError(
            f"The result has expired: it was paid for on {task.submitted_at:%F}, and the "
            f"service keeps results for {days:g} days. {error}",
            task_id=task.task_id,
            code=EXPIRED,
        ) from None
    return images, Times(result.completed_at, result.generation_seconds, waited, downloaded)


def _create_inspection(
    session: Session, row: Row, entry: Entry
) -> Callable[[Image.Image], list[str]]:
    """Create the function that makes the thumbnail of a decoded image and returns its flags."""
    pictures = session.report.pictures
    make_thumbnail = pictures.create_thumbnail_callback(entry.key)
    request = entry.intent.request if entry.intent else row.request
    cells = {**row.cells, **row.request.model_dump(), "id": row.id, "style": row.style}

    def inspect(image: Image.Image) -> list[str]:
        if make_thumbnail is not None:
            make_thumbnail(image)
        reference = pictures.find_fingerprint(row.request.image_urls)
        return session.checks.find_flags(image, cells, request.sent_aspect_ratio, reference)

    return inspect
