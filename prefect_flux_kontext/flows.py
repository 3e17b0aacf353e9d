"""Flows ready to run, to deploy, or to call from your own."""

from __future__ import annotations

import asyncio

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE

from prefect_flux_kontext.api.cadence import PollingCadence
from prefect_flux_kontext.batch.rows import RowRunner, row_runner
from prefect_flux_kontext.batch.summary import BatchSummary
from prefect_flux_kontext.batch.waves import Wave, run_waves
from prefect_flux_kontext.credentials import FluxKontextCredentials, resolve_credentials
from prefect_flux_kontext.manifest.reading import Manifest
from prefect_flux_kontext.models import (
    AspectRatio,
    GenerationRequest,
    Mode,
    OutputFormat,
    Provider,
    StoredImage,
)
from prefect_flux_kontext.settings import FluxKontextSettings
from prefect_flux_kontext.storage import OutputFolder
from prefect_flux_kontext.tasks import persist_images, submit_generation, wait_for_generation

__all__ = ["style_transfer", "style_transfer_batch"]


@flow(name="style-transfer")
async def style_transfer(
    prompt: str,
    output: str,
    image: str | None = None,
    credentials: FluxKontextCredentials | str | None = None,
    mode: Mode = "pro",
    aspect_ratio: AspectRatio = "16:9",
    output_format: OutputFormat = "jpeg",
    provider: Provider = "auto",
    name: str | None = None,
    cadence: PollingCadence | None = None,
) -> list[StoredImage]:
    """Restyle one image, or make one from text alone.

    Args:
        prompt: What to make, 1 to 10,000 characters.
        output: Folder or prefix to store to, on any fsspec filesystem.
        image: URL of the reference image; none makes the image from the prompt alone.
        credentials: The account: a Block, the name of a saved one, or none for the environment.
        mode: `pro` for higher quality, `max` for balanced quality and speed.
        aspect_ratio: Width to height of the result.
        output_format: Kind of the result.
        provider: How the service routes the task.
        name: File name without extension; none takes the task id.
        cadence: When to ask how the task is doing; none for the environment's cadence.

    Returns:
        What was stored.

    Raises:
        FluxKontextError: What went wrong; see the three tasks.
    """
    request = GenerationRequest(
        prompt=prompt,
        image_urls=[image] if image else [],
        mode=mode,
        aspect_ratio=aspect_ratio,
        output_format=output_format,
        provider=provider,
    )
    account = await resolve_credentials(credentials)
    await OutputFolder(output).check_writable()
    submitted = await submit_generation(request, account)
    result = await wait_for_generation(submitted, account, cadence)
    return await persist_images(result, output, name)


@flow(name="style-transfer-batch")
async def style_transfer_batch(
    manifest: str,
    output: str,
    credentials: FluxKontextCredentials | str | None = None,
    prompt: str | None = None,
    cadence: PollingCadence | None = None,
) -> BatchSummary:
    """Restyle every image of a manifest.

    Rows run in waves of 250, one task run each; waves overlap and keep the account's limits
    together. A bad row fails alone and is counted with its reason.

    Args:
        manifest: Path or fsspec URL of a CSV file with the columns `id`, `image`, `prompt` and,
            where wanted, `mode`, `aspect_ratio`, `output_format`, `provider`.
        output: Folder or prefix to store to, on any fsspec filesystem.
        credentials: The account: a Block, the name of a saved one, or none for the environment.
        prompt: The prompt for rows that have none of their own.
        cadence: When to ask how a task is doing; none for the environment's cadence.

    Returns:
        How many rows were stored, how many failed and why.

    Raises:
        ManifestError: The manifest cannot be read; nothing was submitted.
        ConfigurationError: Credentials or output are wrong; nothing was submitted.
        BatchStoppedError: The service refuses the account; the rest was not submitted.
    """
    logger = get_run_logger()
    account = await resolve_credentials(credentials)
    folder = OutputFolder(output)
    rows = Manifest(manifest, prompt)
    check = await asyncio.to_thread(rows.check)
    await folder.check_writable()
    logger.info("%d rows from %s, %d of them refused.", check.rows, manifest, check.refused)

    client = account.get_client()
    async with row_runner(client, folder, cadence or FluxKontextSettings().cadence()) as runner:
        await client.check()
        summary = await run_waves(
            rows,
            runner,
            lambda wave: run_wave(runner, wave),
            concurrent_tasks=account.concurrent_tasks,
        )
    logger.info("%s.", summary)
    return summary


@task(name="wave", task_run_name="wave-{wave.number}", retries=0, cache_policy=NO_CACHE)
async def run_wave(runner: RowRunner, wave: Wave) -> BatchSummary:
    """Run a block of rows as one task run: one for each image would drown the server."""
    logger = get_run_logger()
    summary = await runner.run_wave(wave.rows)
    for row in summary.failures:
        logger.warning(
            "Row %s (line %d, task %s) failed: %s", row.id, row.line, row.task_id, row.message
        )
    logger.info("Wave %d: %s.", wave.number, summary)
    return summary
