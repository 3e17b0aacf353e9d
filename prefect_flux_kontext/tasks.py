"""The three tasks for your own flows: submit a generation, wait for it, persist its images."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

from prefect import get_run_logger
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import MissingContextError

from prefect_flux_kontext.batch.single import (
    read_entry,
    record_failure,
    record_images,
    submit_once,
)
from prefect_flux_kontext.callbacks.options import resolve_callback_options
from prefect_flux_kontext.callbacks.requests import RequestCallbacks
from prefect_flux_kontext.client.polling import PollingCadence, wait_until_ended
from prefect_flux_kontext.credentials import FluxKontextCredentials, resolve_credentials
from prefect_flux_kontext.errors import FluxKontextError, GenerationFailedError
from prefect_flux_kontext.images.download import open_download_client
from prefect_flux_kontext.images.persist import persist_result, place_stored_images
from prefect_flux_kontext.ledger.store import open_ledger_store
from prefect_flux_kontext.models import (
    GenerationRequest,
    GenerationResult,
    GenerationTask,
    StoredImage,
)
from prefect_flux_kontext.orchestration.dispatch import dispatched_task
from prefect_flux_kontext.orchestration.parameters import (
    Output,
    StorageOptions,
    open_output,
    refer_to_output,
)
from prefect_flux_kontext.orchestration.suspension import check_can_suspend
from prefect_flux_kontext.references.ratio import open_ratio_matcher
from prefect_flux_kontext.references.resolver import References, create_references
from prefect_flux_kontext.settings import FluxKontextSettings
from prefect_flux_kontext.storage.names import make_safe_name

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State, TaskRun


async def _is_transient(task: Any, task_run: TaskRun, state: State[Any]) -> bool:  # noqa: ARG001
    """Whether a retry may succeed: not after a failed generation, a refusal or a wrong setting."""
    error = await state.aresult(raise_on_failure=False)
    return isinstance(error, FluxKontextError) and error.retryable


async def _was_not_accepted(task: Any, task_run: TaskRun, state: State[Any]) -> bool:  # noqa: ARG001
    """Whether a submit may be repeated: only if it is known that it was not accepted."""
    error = await state.aresult(raise_on_failure=False)
    return isinstance(error, FluxKontextError) and error.not_accepted and error.retryable


@dispatched_task(
    name="submit-generation",
    retries=0,
    retry_condition_fn=_was_not_accepted,
    cache_policy=NO_CACHE,
)
async def submit_generation(
    request: GenerationRequest,
    credentials: FluxKontextCredentials | str | None = None,
    ledger: Output | None = None,
    key: str | None = None,
    storage_options: StorageOptions = None,
    defer: Literal["suspend"] | None = None,
    references: References | None = None,
) -> GenerationTask:
    """Submit one generation, which is billed from then on.

    With a ledger, a request is paid for once, however often the flow is retried, killed, or run
    again or beside itself: a later call returns the task that was paid for, also if it has failed.
    Without one, keep the task that is returned, or its id, which is logged: a flow that runs again
    pays again.

    Prefect does not cache this task, and retries it only after a submit that the service cannot
    have accepted, because a repeated POST may bill twice. The task itself repeats such a submit
    (no connection, 429).

    Args:
        request: What to create. The image may be local or private if there is a ledger.
        credentials: A credentials Block, or the name of a saved one. Default: the environment.
        ledger: The folder with the ledger: a path, an fsspec URL or a saved storage Block, such as
            the output of the images. Default: FLUX_KONTEXT_LEDGER, else none.
        key: Makes equal requests different ones, so that each is paid for.
        storage_options: Options of the ledger's filesystem. Default: the environment.
        defer: "suspend" if the flow will call `suspend_until_done`: checks before the submit that
            this flow run can be suspended.
        references: Makes a local or private image available to the service. Default: as the
            environment says.

    Returns:
        The accepted task. It carries the ledger, so the other two tasks record there too.

    Raises:
        RefusedError: The service refused the request (4xx), which costs nothing.
        ReplyLostError: The reply was lost; the request may have been accepted and billed. The
            same holds for ServiceTroubleError and UnreadableReplyError. With a ledger, the message
            says how to settle it.
        ConfigurationError: The credentials or the ledger are missing or wrong.
        LedgerError: The ledger cannot be read or written. Nothing was submitted.
    """
    if defer == "suspend":
        check_can_suspend('defer="suspend"')
    account = await resolve_credentials(credentials)
    settings = FluxKontextSettings()
    ledger = settings.ledger if ledger is None else ledger
    if ledger is None:
        async with (
            account.get_client() as client,
            open_ratio_matcher(client.base_url, reads_web=settings.match_references) as ratios,
        ):
            return _log_task(await client.submit(await ratios.match(request)))
    if references is None:
        references = create_references(settings, None, timeout=settings.poll_timeout)
    output = await open_output(ledger, storage_options)
    callbacks = resolve_callback_options(settings, secret=account.callback_secret, listens=False)
    async with account.get_client() as client:
        entry = await submit_once(
            client, request, output, key, references, settings, account.account, callbacks
        )
    reference = {"ledger": refer_to_output(ledger, output), "key": entry.key}
    return _log_task(entry.task.model_copy(update=reference))


def _log_task(task: GenerationTask) -> GenerationTask:
    # With the id, a paid image can be fetched even if this run ends before it is stored.
    with suppress(MissingContextError):  # the task's function was called outside of a run
        logger = get_run_logger()
        logger.info("Accepted as task %s.", task.task_id)
        if task.request is not None and task.request.match_note:
            logger.warning("Task %s: %s.", task.task_id, task.request.match_note)
    return task


@dispatched_task(
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
    storage_options: StorageOptions = None,
) -> GenerationResult:
    """Wait for a submitted generation to end, without holding a thread.

    By default, the task polls after 20 s and then every 3 s. It repeats failed status requests
    and waits out a 429. Waiting costs nothing and can be repeated.

    Args:
        task: The task that `submit_generation` returned, or `GenerationTask(task_id=...)`.
        credentials: A credentials Block, or the name of a saved one. Default: the environment.
        cadence: When to poll, and for how long. Default: the environment
            (FLUX_KONTEXT_POLL_INITIAL_DELAY, _POLL_INTERVAL, _POLL_TIMEOUT).
        storage_options: Options of the filesystem of the task's ledger. Default: the environment.

    Returns:
        The result, with at least one URL, which is valid for some days. If the ledger has the
        images as stored, they are in the result, and nothing is waited for.

    Raises:
        GenerationFailedError: The generation failed; `code` is the fail code of the service.
        GenerationTimeoutError: The generation did not end in time. It is paid for, so wait again
            later.
        RefusedError: The service refused the status request (4xx).
    """
    account = await resolve_credentials(credentials)
    settings = FluxKontextSettings()
    cadence = cadence or settings.cadence()
    if task.ledger is None or task.key is None:
        async with account.get_client() as client:
            return await wait_until_ended(client, task, cadence)
    reference = {"ledger": task.ledger, "key": task.key}
    output = await open_output(task.ledger, storage_options)
    entry = await read_entry(output, task.key)
    ended = entry.ended
    if ended is not None and ended.task_id == task.task_id:
        if ended.state == "failed":
            raise GenerationFailedError(
                ended.message or "The service gave no reason.",
                task_id=task.task_id,
                code=ended.reason,
            )
        return GenerationResult(
            task_id=task.task_id,
            result_urls=[image.uri for image in ended.images],
            request=task.request,
            **reference,
        )
    callbacks = RequestCallbacks(
        resolve_callback_options(settings, secret=account.callback_secret, listens=False),
        open_ledger_store(output),
    )
    async with account.get_client() as client:
        try:
            pauses = callbacks.pauses(entry, cadence)
            result = await wait_until_ended(client, task, cadence, pauses)
        except GenerationFailedError as error:
            await record_failure(output, task.key, error)
            raise
    callbacks.mark_ended(entry)
    return result.model_copy(update=reference)


@dispatched_task(
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
        result: The result that `wait_for_generation` returned. If its ledger has the images as
            stored, nothing is downloaded; another name in the same folder gets a copy.
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
    folder = await open_output(output, storage_options)
    ledger = None
    if result.ledger is not None and result.key is not None:
        # The options are those of the output, which usually has the ledger.
        ledger = await open_output(result.ledger, storage_options)
        ended = (await read_entry(ledger, result.key)).ended
        if ended is not None and ended.images:
            if name is None or str(ledger) != str(folder):
                return ended.images
            uris = await place_stored_images(
                ended.files, ledger, name=make_safe_name(name), key=result.key
            )
            return [
                image.model_copy(update={"uri": uri})
                for image, uri in zip(ended.images, uris, strict=True)
            ]
    base_url = result.base_url or FluxKontextSettings().base_url
    async with open_download_client(base_url=base_url) as http:
        images = await persist_result(
            result,
            folder,
            http,
            name=make_safe_name(name or result.task_id),
            key=result.key,
            ai_mark=FluxKontextSettings().ai_mark,
        )
    if ledger is not None and result.key is not None:
        await record_images(ledger, result.key, images)
    return images
