"""Flows ready to run, to deploy, or to call from your own."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_logger

from prefect_flux_kontext.api.cadence import PollingCadence
from prefect_flux_kontext.batch.batch import FAILED_ROWS, collect, run_batch
from prefect_flux_kontext.batch.policy import FailurePolicy
from prefect_flux_kontext.batch.rows import RowOptions
from prefect_flux_kontext.batch.session import batch_session, ledger_store
from prefect_flux_kontext.batch.status import ledger_status
from prefect_flux_kontext.batch.summary import BatchSummary
from prefect_flux_kontext.batch.waves import Wave
from prefect_flux_kontext.credentials import FluxKontextCredentials, resolve_credentials
from prefect_flux_kontext.errors import ConfigurationError
from prefect_flux_kontext.manifest.given import ManifestSource
from prefect_flux_kontext.manifest.reading import Manifest
from prefect_flux_kontext.manifest.rows import problems_of_reference
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

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from prefect.client.schemas.objects import FlowRun, State

    from prefect_flux_kontext.batch.session import Session

__all__ = ["collect_batch", "retry_failed", "style_transfer", "style_transfer_batch"]


async def tell_what_is_owed(flow: Any, flow_run: FlowRun, state: State[Any]) -> None:  # noqa: ARG001
    """After a cancellation, log what the ledger says is paid for and not stored."""
    output = flow_run.parameters["output"]
    status = await ledger_status(ledger_store(OutputFolder(output)))
    get_logger("prefect_flux_kontext").warning(
        "%s was cancelled. Paid for and not stored: %d rows; maybe paid for: %d. To collect them: "
        "flux-kontext collect %s",
        flow_run.name,
        len(status.outstanding),
        len(status.unknown),
        output,
    )


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
    if image is not None and (problems := problems_of_reference(image)):
        # The service would accept, bill and then fail it.
        raise ConfigurationError(*problems)
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


@flow(name="style-transfer-batch", on_cancellation=[tell_what_is_owed])
async def style_transfer_batch(
    manifest: ManifestSource,
    output: str,
    credentials: FluxKontextCredentials | str | None = None,
    prompt: str | None = None,
    columns: dict[str, str] | None = None,
    cadence: PollingCadence | None = None,
    failure_policy: FailurePolicy | None = None,
    resubmit_unknown: bool = False,
) -> BatchSummary:
    """Restyle every image of a manifest, paying for each row once, whatever dies.

    Rows run in waves of 250, one task run each; waves overlap and keep the account's limits
    together. A bad row fails alone and is counted with its reason. Running it again pays only
    for what is new and collects what was left.

    Args:
        manifest: Path or fsspec URL of a CSV, TSV, JSON Lines or Parquet file with the columns
            `id`, `image` (or `images`), `prompt` and, where wanted, `mode`, `aspect_ratio`,
            `output_format`, `provider`. Or the rows themselves: a list of dicts, or a table that
            speaks Arrow's interface.
        output: Folder or prefix to store to, on any fsspec filesystem.
        credentials: The account: a Block, the name of a saved one, or none for the environment.
        prompt: The prompt for rows that have none of their own.
        columns: The manifest's own names for columns, such as `{"image": "photo_url"}`.
        cadence: When to ask how a task is doing; none for the environment's cadence.
        failure_policy: What to do for each fail code; none for the defaults.
        resubmit_unknown: Pay again for rows whose submit's reply was lost. They may be paid
            for already.

    Returns:
        How many rows were stored, how many failed and why, and what is still owed.

    Raises:
        ManifestError: The manifest cannot be read; nothing was submitted.
        ConfigurationError: Credentials or output are wrong; nothing was submitted.
        BatchStoppedError: The service refuses the account, or nearly all rows fail; the rest
            was not submitted.
        LedgerError: The record of what was paid cannot be trusted; nothing more was submitted.
    """
    logger = get_run_logger()
    rows = Manifest(manifest, prompt, columns or {})
    check = await asyncio.to_thread(rows.check)
    logger.info("%d rows from %s, %d of them refused.", check.rows, rows.url, check.refused)
    settings = FluxKontextSettings()
    options = RowOptions(
        cadence=cadence or settings.cadence(),
        policy=failure_policy or FailurePolicy(),
        resubmit_unknown=resubmit_unknown,
        result_days=settings.result_days,
    )
    async with _opened(output, credentials, options) as (session, slots):
        summary = await run_batch(session, rows.rows(), run_wave, concurrent_tasks=slots)
    logger.info("%s.", summary)
    return summary


@flow(name="retry-failed", on_cancellation=[tell_what_is_owed])
async def retry_failed(
    output: str,
    credentials: FluxKontextCredentials | str | None = None,
    prompt: str | None = None,
    cadence: PollingCadence | None = None,
    failure_policy: FailurePolicy | None = None,
) -> BatchSummary:
    """Run the failed rows of a batch once more, and nothing else.

    They are in `failed.csv` beside the images. Rows against the content rules are not paid for
    again: change their prompt there first.

    Args:
        output: The batch's output.
        credentials: The account: a Block, the name of a saved one, or none for the environment.
        prompt: The prompt for rows that have none of their own.
        cadence: When to ask how a task is doing; none for the environment's cadence.
        failure_policy: What to do for each fail code; none for the defaults.

    Returns:
        What became of them.

    Raises:
        ManifestError: There are no failed rows.
        BatchStoppedError: The service refuses the account, or nearly all rows fail again.
        LedgerError: The record of what was paid cannot be trusted; nothing more was submitted.
    """
    settings = FluxKontextSettings()
    options = RowOptions(
        cadence=cadence or settings.cadence(),
        policy=failure_policy or FailurePolicy(),
        retry_failed=True,
        result_days=settings.result_days,
    )
    rows = Manifest(OutputFolder(output).uri(FAILED_ROWS), prompt)
    await asyncio.to_thread(rows.check)
    async with _opened(output, credentials, options) as (session, slots):
        summary = await run_batch(session, rows.rows(), run_wave, concurrent_tasks=slots)
    get_run_logger().info("%s.", summary)
    return summary


@flow(name="collect-batch")
async def collect_batch(
    output: str,
    credentials: FluxKontextCredentials | str | None = None,
    cadence: PollingCadence | None = None,
) -> BatchSummary:
    """Wait for, download and store what ended runs have paid for; pays for nothing.

    Args:
        output: The batch's output.
        credentials: The account: a Block, the name of a saved one, or none for the environment.
        cadence: When to ask how a task is doing; none for the environment's cadence.

    Returns:
        What became of the rows that were owed something.

    Raises:
        ConfigurationError: Credentials or output are wrong.
        LedgerError: The record of what was paid cannot be read.
    """
    settings = FluxKontextSettings()
    options = RowOptions(cadence=cadence or settings.cadence(), result_days=settings.result_days)
    async with _opened(output, credentials, options) as (session, slots):
        summary = await collect(session, run_wave, concurrent_tasks=slots)
    get_run_logger().info("%s.", summary)
    return summary


@asynccontextmanager
async def _opened(
    output: str, credentials: FluxKontextCredentials | str | None, options: RowOptions
) -> AsyncIterator[tuple[Session, int]]:
    account = await resolve_credentials(credentials)
    folder = OutputFolder(output)
    await folder.check_writable()
    settings = FluxKontextSettings()
    async with batch_session(account.get_client(), folder, options, settings) as session:
        yield session, account.concurrent_tasks


@task(name="wave", task_run_name="wave-{wave.number}", retries=0, cache_policy=NO_CACHE)
async def run_wave(wave: Wave) -> BatchSummary:
    """Run a block of rows as one task run: one for each image would drown the server."""
    logger = get_run_logger()
    summary = await wave.run()
    for row in summary.failures:
        logger.warning(
            "Row %s (line %d, task %s) is %s: %s",
            row.id,
            row.line,
            row.task_id,
            row.state,
            row.message,
        )
    logger.info("Wave %d: %s.", wave.number, summary)
    return summary
