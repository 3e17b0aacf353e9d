"""The three tasks for your own flows: submit a generation, wait for it, persist its images."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from prefect_flux_kontext.client.polling import PollingCadence, wait_until_ended
from prefect_flux_kontext.credentials import FluxKontextCredentials, resolve_credentials
from prefect_flux_kontext.errors import FluxKontextError
from prefect_flux_kontext.images.download import open_download_client
from prefect_flux_kontext.images.persist import persist_result
from prefect_flux_kontext.models import (
    GenerationRequest,
    GenerationResult,
    GenerationTask,
    StoredImage,
)
from prefect_flux_kontext.orchestration.parameters import Output, StorageOptions, open_output
from prefect_flux_kontext.references.ratio import RatioMatcher
from prefect_flux_kontext.references.resolver import References
from prefect_flux_kontext.settings import FluxKontextSettings
from prefect_flux_kontext.storage.names import make_safe_name

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State, TaskRun

logger = logging.getLogger(__name__)


async def _is_transient(task: Any, task_run: TaskRun, state: State[Any]) -> bool:  # noqa: ARG001
    """Whether a retry may succeed: not after a failed generation, a refusal or a wrong setting."""
    try:
        await state.aresult()
    except FluxKontextError as error:
        return error.retryable
    except Exception:  # noqa: BLE001 - not one of our errors, so not retryable
        return False
    return False


@task(name="submit-generation", retries=0, cache_policy=NO_CACHE)
async def submit_generation(
    request: GenerationRequest, credentials: FluxKontextCredentials | str | None = None
) -> GenerationTask:
    """Submit one generation, which is billed from then on.

    Prefect neither retries nor caches this task, because a repeated POST may bill twice. The task
    itself repeats a submit that the service cannot have accepted (no connection, 429). Keep the
    task that it returns, or its id: with it, any flow can wait for the result later.

    Args:
        request: What to create.
        credentials: A credentials Block, or the name of a saved one. Default: the environment.

    Returns:
        The accepted task.

    Raises:
        RefusedError: The service refused the request (4xx), which costs nothing.
        ReplyLostError: The reply was lost; the request may have been accepted and billed. The
            same holds for ServiceTroubleError and UnreadableReplyError.
        ConfigurationError: The credentials are missing or wrong.
    """
    account = await resolve_credentials(credentials)
    async with account.get_client() as client:
        return await client.submit(await _match_ratio(request, client.base_url))


@task(name="submit-own-reference", retries=0, cache_policy=NO_CACHE)
async def submit_own_reference(
    request: GenerationRequest, references: References, account: FluxKontextCredentials
) -> GenerationTask:
    """Submit one generation whose reference image is local or private.

    The image is staged or signed inside this task, because Prefect may store the parameters and
    results of tasks, and a signed URL must not be among them.

    Args:
        request: What to create.
        references: Stages or signs the image.
        account: The account.

    Raises:
        ReferenceImageError: The image cannot be used; nothing was submitted.
        StorageError: The image could not be staged; nothing was submitted.
        ApiError: As for `submit_generation`.
    """
    request = await _match_ratio(request, None)
    sending = await references.prepare(request)

    async with account.get_client() as client:
        attempts = client.submit_attempts()
        while not attempts.is_over:
            async with await attempts.next_slot() as slot:
                outcome = await slot.post(await sending())
    return outcome.to_task(request)


async def _match_ratio(request: GenerationRequest, base_url: str | None) -> GenerationRequest:
    if not FluxKontextSettings().match_references:
        return await RatioMatcher(None).match(request)
    async with open_download_client(base_url=base_url) as http:
        request = await RatioMatcher(http).match(request)
    if request.match_note:
        logger.warning("%s", request.match_note)
    return request


@task(
    name="wait-for-generation",
    retries=2,
    retry_delay_seconds=10,
    retry_jitter_factor=0.5,
    retry_condition_fn=_is_transient,
    cache_policy=NO_CACHE,
)
async def wait_for_generation(
    task: GenerationTask,
    credentials: FluxKontextCredentials | str | None = None,
    cadence: PollingCadence | None = None,
) -> GenerationResult:
    """Wait for a submitted generation to end, without holding a thread.

    By default, the task polls after 20 s and then every 3 s. It repeats failed status requests
    and waits out a 429. Waiting costs nothing and can be repeated.

    Args:
        task: The task that `submit_generation` returned, or `GenerationTask(task_id=...)`.
        credentials: A credentials Block, or the name of a saved one. Default: the environment.
        cadence: When to poll, and for how long. Default: the environment
            (FLUX_KONTEXT_POLL_INITIAL_DELAY, _POLL_INTERVAL, _POLL_TIMEOUT).

    Returns:
        The result, with at least one URL, which is valid for some days.

    Raises:
        GenerationFailedError: The generation failed; `code` is the fail code of the service.
        GenerationTimeoutError: The generation did not end in time. It is paid for, so wait again
            later.
        RefusedError: The service refused the status request (4xx).
    """
    account = await resolve_credentials(credentials)
    async with account.get_client() as client:
        return await wait_until_ended(client, task, cadence or FluxKontextSettings().cadence())


@task(
    name="persist-images",
    retries=3,
    retry_delay_seconds=[5, 20, 60],
    retry_jitter_factor=0.5,
    retry_condition_fn=_is_transient,
    cache_policy=NO_CACHE,
)
async def persist_images(
    result: GenerationResult,
    output: Output,
    name: str | None = None,
    storage_options: StorageOptions = None,
) -> list[StoredImage]:
    """Download the images of a result, verify them and store them.

    Each image is decoded completely before it is stored, and no reader sees half a file.

    Args:
        result: The result that `wait_for_generation` returned.
        output: Folder or prefix on any fsspec filesystem, such as `out/` or
            `s3://bucket/prefix`; or a storage Block, or `block:` and the reference of one.
        name: File name without extension. Default: the task id. The second image of a result
            gets the suffix `~2`, and so on.
        storage_options: Options of the output's filesystem, or an AWS credentials Block.
            Default: the environment.

    Returns:
        For each image its URI, format, size in bytes, sha256, width and height in pixels.

    Raises:
        DownloadError: A result URL could not be downloaded.
        RefusedUrlError: A result URL leads to an address that downloads may not reach.
        InvalidImageError: A result URL does not serve a complete image.
        ConfigurationError: The output is not a usable folder.
        StorageError: The output did not accept the file.
    """
    base_url = result.base_url or FluxKontextSettings().base_url
    async with open_download_client(base_url=base_url) as http:
        return await persist_result(
            result,
            await open_output(output, storage_options),
            http,
            name=make_safe_name(name or result.task_id),
            ai_mark=FluxKontextSettings().ai_mark,
        )
