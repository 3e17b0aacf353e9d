"""The three tasks for your own flows, submit, wait and persist, and the task of a batch's wave."""

from __future__ import annotations

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
from prefect_flux_kontext.references.resolver import References
from prefect_flux_kontext.settings import FluxKontextSettings
from prefect_flux_kontext.storage.names import safe_name

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State, TaskRun


async def _is_transient(task: Any, task_run: TaskRun, state: State[Any]) -> bool:  # noqa: ARG001
    """Retry what may pass; a failed generation, a refusal or a wrong setting stays as it is."""
    try:
        await state.aresult()
    except FluxKontextError as error:
        return error.retryable
    except Exception:  # noqa: BLE001 - whatever else it is, trying again does not mend it
        return False
    return False


@task(name="submit-generation", retries=0, cache_policy=NO_CACHE)
async def submit_generation(
    request: GenerationRequest, credentials: FluxKontextCredentials | str | None = None
) -> GenerationTask:
    """Submit one generation. From then on it is billed.

    Never retried and never cached by Prefect: a repeated POST may bill twice. What is known not
    to have been accepted (no connection, 429) is repeated inside. Keep the task it returns, or
    just its id: it is all that is needed to wait for the result, from any flow, later.

    Args:
        request: What to make.
        credentials: The account: a Block, the name of a saved one, or None for the environment.

    Returns:
        The accepted task.

    Raises:
        RefusedError: The service refused it (4xx): it costs nothing.
        ReplyLostError: The reply was lost: it may have been accepted and billed. Likewise
            ServiceTroubleError and UnreadableReplyError.
        ConfigurationError: The credentials are missing or wrong.
    """
    account = await resolve_credentials(credentials)
    async with account.get_client() as client:
        return await client.submit(request)


@task(name="submit-own-reference", retries=0, cache_policy=NO_CACHE)
async def submit_own_reference(
    request: GenerationRequest, references: References, account: FluxKontextCredentials
) -> GenerationTask:
    """Submit one generation whose reference image is local or private.

    It is staged or signed in here, so that no signed URL is ever a parameter or a result of a
    task, which Prefect may keep.

    Raises:
        ReferenceImageError: The image is not to be used; nothing was sent.
        StorageError: It could not be staged; nothing was sent.
        ApiError: As `submit_generation`.
    """
    sending = await references.prepared(request)

    async with account.get_client() as client:
        attempts = client.submit_attempts()
        while not attempts.is_over:
            async with await attempts.next_slot() as slot:
                outcome = await slot.post(await sending())
    return outcome.to_task(request)


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
    """Wait for a submitted generation to end, holding no thread.

    First look after 20 s, then every 3 s, unless the cadence says otherwise. Status requests
    that go wrong are asked again; a 429 is waited out. Waiting costs nothing, so it may be
    repeated at will.

    Args:
        task: What `submit_generation` returned, or `GenerationTask(task_id=...)`.
        credentials: The account: a Block, the name of a saved one, or None for the environment.
        cadence: When to ask, and for how long; None for the environment's
            (FLUX_KONTEXT_POLL_INITIAL_DELAY, _POLL_INTERVAL, _POLL_TIMEOUT).

    Returns:
        The result, with at least one URL that lives for some days.

    Raises:
        GenerationFailedError: The service gave up on it; `code` is its fail code.
        GenerationTimeoutError: It did not end in time. It is paid for: wait again later.
        RefusedError: The service refuses to tell (4xx).
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
    """Download the images of a result, check them, and put them in their place whole.

    Args:
        result: What `wait_for_generation` returned.
        output: Folder or prefix on any fsspec filesystem: `out/`, `s3://bucket/prefix`, …; or a
            storage Block, or `block:` with the reference of one.
        name: File name without extension; None takes the task id. A second image of the same
            result gets `~2` after it, and so on.
        storage_options: What the output's filesystem needs to know, or an AWS credentials Block;
            None for the environment's.

    Returns:
        For each image its URI, kind, size in bytes, sha256, width and height in pixels.

    Raises:
        DownloadError: A result URL could not be fetched.
        RefusedUrlError: A result URL leads where no download may go.
        InvalidImageError: It does not serve a whole image.
        ConfigurationError: The output is no usable folder.
        StorageError: The output refused the file.
    """
    base_url = result.base_url or FluxKontextSettings().base_url
    async with open_download_client(base_url=base_url) as http:
        return await persist_result(
            result,
            await open_output(output, storage_options),
            http,
            name=safe_name(name or result.task_id),
            ai_mark=FluxKontextSettings().ai_mark,
        )
