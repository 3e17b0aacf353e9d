"""The flow over one image. Like those over manifests, it is imported from `flows`."""

from pathlib import Path
from typing import Literal

from prefect import flow, get_run_logger
from pydantic import NonNegativeFloat, PositiveInt

from prefect_flux_kontext.batch.collection import collect_outstanding
from prefect_flux_kontext.batch.policy import FailurePolicy
from prefect_flux_kontext.batch.runner import read_failed_rows, run_batch
from prefect_flux_kontext.batch.summary import BatchSummary
from prefect_flux_kontext.client.polling import PollingCadence
from prefect_flux_kontext.credentials import resolve_credentials
from prefect_flux_kontext.errors import BatchStoppedError, ConfigurationError
from prefect_flux_kontext.manifest.reader import Manifest
from prefect_flux_kontext.manifest.row import find_reference_problems
from prefect_flux_kontext.manifest.tables import ManifestSource
from prefect_flux_kontext.models import (
    AspectRatio,
    GenerationRequest,
    Mode,
    OutputFormat,
    Provider,
    StoredImage,
)
from prefect_flux_kontext.orchestration.approval import ask_for_approval, plan_and_log
from prefect_flux_kontext.orchestration.batch_run import (
    build_row_options,
    emit_expiring_results,
    open_batch,
    run_wave,
)
from prefect_flux_kontext.orchestration.parameters import (
    Account,
    Output,
    Prompt,
    StorageOptions,
    StyleNames,
    open_output,
)
from prefect_flux_kontext.orchestration.partitions.coordinator import run_partitions, run_remaining
from prefect_flux_kontext.orchestration.partitions.planner import plan_partitions
from prefect_flux_kontext.orchestration.suspension import (
    check_can_suspend,
    log_outstanding,
    resume_suspended,
    suspend,
    was_resumed,
)
from prefect_flux_kontext.references.location import locate, non_public_references
from prefect_flux_kontext.references.resolver import create_references
from prefect_flux_kontext.settings import FluxKontextSettings
from prefect_flux_kontext.tasks import (
    persist_images,
    submit_generation,
    submit_own_reference,
    wait_for_generation,
)

# Annotations are real objects here, not strings: `serve` pickles a flow with the names that its
# code uses, and strings are none.


@flow(name="style-transfer")
async def style_transfer(
    prompt: str,
    output: Output,
    image: str | None = None,
    credentials: Account = None,
    mode: Mode = "pro",
    aspect_ratio: AspectRatio = "16:9",
    output_format: OutputFormat = "jpeg",
    provider: Provider = "auto",
    name: str | None = None,
    cadence: PollingCadence | None = None,
    fit_references: bool = False,
    storage_options: StorageOptions = None,
) -> list[StoredImage]:
    """Restyle one image, or make one from text alone.

    Args:
        prompt: What to make, 1 to 10,000 characters.
        output: Folder or prefix to store to, on any fsspec filesystem; or `block:s3-bucket/NAME`.
        image: The reference image: a URL, an object in a bucket or a local file, which needs a
            staging place; none makes the image from the prompt alone.
        credentials: The account: a Block, the name of a saved one, or none for the environment.
        mode: `pro` for higher quality, `max` for balanced quality and speed.
        aspect_ratio: Width to height of the result.
        output_format: Kind of the result.
        provider: How the service routes the task.
        name: File name without extension; none takes the task id.
        cadence: When to ask how the task is doing; none for the environment's cadence.
        fit_references: Shrink a local or private image that is over 10 MB.
        storage_options: The options of the output's filesystem, or `block:aws-credentials/NAME`;
            Prefect keeps them in the clear, so keys belong in a Block.

    Returns:
        What was stored.

    Raises:
        FluxKontextError: What went wrong; see the three tasks.
    """
    folder = str(Path.cwd())
    if image is not None and (problems := find_reference_problems(image, folder)):
        # The service would accept, bill and then fail it.
        raise ConfigurationError(*problems)
    request = GenerationRequest(
        prompt=prompt,
        image_urls=[locate(image, folder)] if image else [],
        mode=mode,
        aspect_ratio=aspect_ratio,
        output_format=output_format,
        provider=provider,
    )
    account = await resolve_credentials(credentials)
    output = await open_output(output, storage_options)
    await output.check_writable()
    if non_public_references(request.image_urls):
        settings = FluxKontextSettings()
        timeout = (cadence or settings.cadence()).timeout
        references = create_references(settings, timeout=timeout, fit=fit_references)
        submitted = await submit_own_reference(request, references, account)
    else:
        submitted = await submit_generation(request, account)
    result = await wait_for_generation(submitted, account, cadence)
    return await persist_images(result, output, name)


# Annotations are real objects here, not strings: `serve` pickles a flow with the names that its
# code uses, and strings are none.


__all__ = ["collect_batch", "retry_failed", "style_transfer", "style_transfer_batch"]


@flow(name="style-transfer-batch", on_cancellation=[log_outstanding])
async def style_transfer_batch(
    manifest: ManifestSource,
    output: Output,
    credentials: Account = None,
    prompt: Prompt = None,
    columns: dict[str, str] | None = None,
    styles: StyleNames = None,
    output_names: str | None = None,
    cadence: PollingCadence | None = None,
    failure_policy: FailurePolicy | None = None,
    resubmit_unknown: bool = False,
    skip_invalid: bool = False,
    fit_references: bool = False,
    budget_usd: NonNegativeFloat | None = None,
    approve_above_usd: NonNegativeFloat | None = None,
    callback_url: str | None = None,
    dry_run: bool = False,
    wait: Literal["poll", "suspend", "collect"] = "poll",
    alert_above_usd: NonNegativeFloat | None = None,
    partitions: PositiveInt = 1,
    partition_deployment: str = "style-transfer-partition/partition-of-batch",
    storage_options: StorageOptions = None,
) -> BatchSummary:
    """Restyle every image of a manifest, paying for each row once, whatever dies.

    First comes the plan: what is valid, what is new, what it costs. Then rows run in waves of
    250, one task run each; waves overlap and keep the account's limits together. Running it
    again pays only for what is new and collects what was left.

    Args:
        manifest: Path or fsspec URL of a CSV, TSV, JSON Lines or Parquet file with the columns
            `id`, `image` (or `images`), `prompt` and, where wanted, `style`, `mode`,
            `aspect_ratio`, `output_format`, `provider`, `output`. Or a folder, prefix or glob of
            images. Or the rows themselves: a list of dicts, or a table that speaks Arrow's
            interface.
        output: Folder or prefix to store to, on any fsspec filesystem; or `block:s3-bucket/NAME`.
        credentials: The account: a Block, the name of a saved one, or none for the environment.
        prompt: The prompt for rows that have none of their own.
        columns: The manifest's own names for columns, such as `{"image": "photo_url"}`.
        styles: Names of styles and paths of files of styles. Each row that names no style of its
            own is made once in each of them.
        output_names: Template of the images' names, such as `{style}/{id}.{ext}`, with any
            column; none for `{id}/{style}.{ext}`, or `{id}.{ext}` for rows without a style.
        cadence: When to ask how a task is doing; none for the environment's cadence.
        failure_policy: What to do for each fail code; none for the defaults.
        resubmit_unknown: Pay again for rows whose submit's reply was lost. They may be paid
            for already.
        skip_invalid: Run the other rows where some are invalid; else nothing is submitted.
        fit_references: Shrink local and private reference images that are over 10 MB.
        budget_usd: Dollars that the output may cost in all, with earlier runs and what may be
            paid for; the row that would pass it ends the run.
        approve_above_usd: Pause for a person's approval, on the page of the flow run, when the
            plan costs more dollars than this. The run then costs at most what was approved.
        callback_url: Where the service is to call when an image is ready, in place of polling;
            none for FLUX_KONTEXT_CALLBACK_URL.
        dry_run: Stop after the plan; rows that would be paid count as not submitted.
        wait: `poll` waits for every result in this process. `suspend` submits all rows, then
            suspends the flow run, so that no process and no worker slot is held, and stores the
            results once it is resumed; it needs a deployment and is no subflow. `collect` submits
            all rows and ends; `collect_batch` stores the results. Where there are more rows than
            the account has slots, both store results until the last row is submitted.
        alert_above_usd: Emit the event `flux-kontext.batch.spend-above` once this run has spent
            more dollars than this.
        partitions: Number of partitions. Each is a flow run of its own, on whatever worker
            takes it. Together they keep the account's limits.
        partition_deployment: The deployment that runs partitions.
        storage_options: The options of the output's filesystem, or `block:aws-credentials/NAME`;
            Prefect keeps them in the clear, so keys belong in a Block.

    Returns:
        How many rows were stored, how many failed and why, and what is still owed.

    Raises:
        ManifestError: The manifest cannot be read or has invalid rows; nothing was submitted.
        ConfigurationError: Credentials or output are wrong, or another run is paying into an
            output with a budget; nothing was submitted.
        BatchStoppedError: The service refuses the account, nearly all rows fail, the budget is
            reached or the plan was not approved; the rest was not submitted.
        LedgerError: The record of what was paid cannot be trusted; nothing more was submitted.
    """
    if wait == "suspend":
        check_can_suspend()
    suspends = wait == "suspend" and not was_resumed()
    options = build_row_options(
        cadence,
        failure_policy,
        resubmit_unknown=resubmit_unknown,
        budget_usd=budget_usd,
        fit_references=fit_references,
        deferred=suspends or wait == "collect",
    )
    account = await resolve_credentials(credentials)
    partition_plan = (
        await plan_partitions(partitions, partition_deployment, account, wait)
        if partitions > 1
        else None
    )
    output = await open_output(output, storage_options)
    rows = Manifest(manifest, prompt, columns or {}, styles, output_names, str(output))
    plan = await plan_and_log(rows, output, account, options)
    plan.check(skip_invalid=skip_invalid)
    if dry_run:
        return plan.summary(str(output))
    if approve_above_usd is not None:
        if plan.price > approve_above_usd:
            await ask_for_approval(plan)
            if (await plan_and_log(rows, output, account, options)).digest != plan.digest:
                raise BatchStoppedError(
                    "What is to be paid has changed since the plan that was approved, so nothing "
                    "was submitted. Run it again to approve the new plan."
                )
        options = plan.capped(options, approve_above_usd)
    async with (
        run_partitions(
            partition_plan, plan, rows, output, account, options, alert_above_usd
        ) as rest,
        open_batch(
            output,
            rest.account,
            rest.options,
            plan,
            callback_url=callback_url,
            alert_above_usd=rest.alert_above_usd,
            suspends=suspends,
            earlier=rest.earlier,
        ) as (session, slots),
    ):
        if rest.lease is not None:
            rest.lease.held_for(session.submitter)
        waves = run_wave if rest.earlier is None else run_remaining
        summary = await run_batch(session, rows.rows(), waves, concurrent_tasks=slots)
    if rest.earlier is not None:
        summary.spent += rest.earlier.spent
        summary.seconds += rest.earlier.seconds
    get_run_logger().info("%s.", summary)
    if suspends and summary.outstanding:
        await suspend()
    return summary


@flow(name="retry-failed", on_cancellation=[log_outstanding])
async def retry_failed(
    output: Output,
    credentials: Account = None,
    prompt: Prompt = None,
    styles: StyleNames = None,
    cadence: PollingCadence | None = None,
    failure_policy: FailurePolicy | None = None,
    fit_references: bool = False,
    budget_usd: NonNegativeFloat | None = None,
    storage_options: StorageOptions = None,
) -> BatchSummary:
    """Run the failed rows of a batch once more, and nothing else.

    They are in `failed.csv` beside the images. Rows against the content rules are not paid for
    again: change their prompt there first.

    Args:
        output: The batch's output.
        credentials: The account: a Block, the name of a saved one, or none for the environment.
        prompt: The prompt for rows that have none of their own.
        styles: The files of styles that the batch was run with; the rows name their styles.
        cadence: When to ask how a task is doing; none for the environment's cadence.
        failure_policy: What to do for each fail code; none for the defaults.
        fit_references: Shrink local and private reference images that are over 10 MB.
        budget_usd: Dollars that the output may cost in all, with earlier runs and what may be
            paid for; the row that would pass it ends the run.
        storage_options: The options of the output's filesystem, or `block:aws-credentials/NAME`;
            Prefect keeps them in the clear, so keys belong in a Block.

    Returns:
        What became of them.

    Raises:
        ManifestError: There are no failed rows.
        BatchStoppedError: The service refuses the account, or nearly all rows fail again.
        LedgerError: The record of what was paid cannot be trusted; nothing more was submitted.
    """
    options = build_row_options(
        cadence,
        failure_policy,
        retry_failed=True,
        budget_usd=budget_usd,
        fit_references=fit_references,
    )
    account = await resolve_credentials(credentials)
    output = await open_output(output, storage_options)
    rows = Manifest(await read_failed_rows(output), prompt, styles=styles)
    # A row that was skipped as invalid stands there too, and must not stop the others.
    plan = await plan_and_log(rows, output, account, options)
    plan.check(skip_invalid=True)
    async with open_batch(output, account, options, plan) as (session, slots):
        summary = await run_batch(session, rows.rows(), run_wave, concurrent_tasks=slots)
    get_run_logger().info("%s.", summary)
    return summary


@flow(name="collect-batch")
async def collect_batch(
    output: Output,
    credentials: Account = None,
    cadence: PollingCadence | None = None,
    storage_options: StorageOptions = None,
) -> BatchSummary:
    """Wait for, download and store what ended runs have paid for; pays for nothing.

    When all is stored, the flow runs that are suspended for it are resumed.

    Args:
        output: The batch's output.
        credentials: The account: a Block, the name of a saved one, or none for the environment.
        cadence: When to ask how a task is doing; none for the environment's cadence.
        storage_options: The options of the output's filesystem, or `block:aws-credentials/NAME`;
            Prefect keeps them in the clear, so keys belong in a Block.

    Returns:
        What became of the rows that were owed something.

    Raises:
        ConfigurationError: Credentials or output are wrong.
        LedgerError: The record of what was paid cannot be read.
    """
    options = build_row_options(cadence, None)
    account = await resolve_credentials(credentials)
    output = await open_output(output, storage_options)
    async with open_batch(output, account, options, listens=False) as (session, slots):
        summary = await collect_outstanding(session, run_wave, concurrent_tasks=slots)
    get_run_logger().info("%s.", summary)
    if summary.outstanding:
        await emit_expiring_results(output)
    elif resumed := await resume_suspended(output):
        get_run_logger().info("Resumed what waited for these results: %s.", resumed)
    return summary
