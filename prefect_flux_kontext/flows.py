"""The flows: one image, a batch of a manifest, collecting results, retrying failed rows.

Annotations are real objects here, not strings: `serve` pickles a flow together with the names
that its code uses, and names inside string annotations are not among them.
"""

from contextlib import closing
from typing import Literal

from prefect import get_run_logger
from pydantic import NonNegativeFloat, PositiveInt

from prefect_flux_kontext.batch.policy import FailurePolicy
from prefect_flux_kontext.batch.runner import read_failed_manifest, run_batch, run_collection
from prefect_flux_kontext.batch.summary import BatchSummary
from prefect_flux_kontext.client.polling import PollingCadence
from prefect_flux_kontext.credentials import resolve_credentials
from prefect_flux_kontext.errors import ConfigurationError
from prefect_flux_kontext.manifest.formats import ManifestFormat
from prefect_flux_kontext.manifest.reader import Manifest
from prefect_flux_kontext.manifest.row import find_reference_problems
from prefect_flux_kontext.manifest.tables import ManifestSource
from prefect_flux_kontext.models import (
    GenerationRequest,
    Mode,
    OutputFormat,
    Provider,
    RequestedRatio,
    StoredImage,
)
from prefect_flux_kontext.orchestration.approval import (
    ask_for_approval,
    plan_and_log,
    run_pilot,
)
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
    Variants,
    flow_without_rows,
    open_output,
)
from prefect_flux_kontext.orchestration.partitions.coordinator import run_partitions, run_remaining
from prefect_flux_kontext.orchestration.partitions.planner import plan_partitions
from prefect_flux_kontext.orchestration.run_page import complete, decline, name_run
from prefect_flux_kontext.orchestration.suspension import (
    check_can_suspend,
    log_outstanding,
    resume_suspended,
    suspend_batch,
    was_resumed,
)
from prefect_flux_kontext.references.location import non_public_references, normalize_reference
from prefect_flux_kontext.references.resolver import create_references
from prefect_flux_kontext.references.rights import find_rights, find_rights_problem
from prefect_flux_kontext.settings import FluxKontextSettings
from prefect_flux_kontext.tasks import (
    persist_images,
    submit_generation,
    submit_own_reference,
    wait_for_generation,
)

__all__ = ["collect_batch", "retry_failed", "style_transfer", "style_transfer_batch"]


@flow_without_rows(name="style-transfer", flow_run_name=name_run)
async def style_transfer(
    prompt: str,
    output: Output,
    image: str | None = None,
    credentials: Account = None,
    mode: Mode = "pro",
    aspect_ratio: RequestedRatio = "match",
    output_format: OutputFormat = "jpeg",
    provider: Provider = "auto",
    name: str | None = None,
    key: str | None = None,
    cadence: PollingCadence | None = None,
    fit_references: bool = False,
    storage_options: StorageOptions = None,
) -> list[StoredImage]:
    """Restyle one image, or create one from text alone.

    The flow submits one generation, waits for its result and stores the images. The generation is
    billed from the submit on.

    Args:
        prompt: What to create, 1 to 10,000 characters.
        output: Folder or prefix to store the images in, on any fsspec filesystem, or
            `block:s3-bucket/NAME`.
        image: The reference image: a URL, an object in a bucket, or a local file, which needs a
            staging location. Without one, the prompt alone makes the image.
        credentials: A credentials Block, or the name of a saved one. Default: the environment.
        mode: `pro` for higher quality, `max` for balanced quality and speed.
        aspect_ratio: Width to height of the result. `match`: the ratio nearest to that of the
            reference image, or 16:9 without one.
        output_format: File format of the result.
        provider: How the service routes the task.
        name: File name without extension. Default: the task id.
        key: Makes equal requests different ones. Without it, a request that this output has
            already is not paid for again.
        cadence: When to poll for the result. Default: the environment.
        fit_references: Shrink a local or private image of more than 10 MB.
        storage_options: Options of the output's filesystem, or `block:aws-credentials/NAME`.
            Prefect stores parameters in plain text, so keep keys in a Block.

    Returns:
        The stored images.

    Raises:
        FluxKontextError: A step failed; the three tasks list the errors.
    """
    account = await resolve_credentials(credentials)
    rights = find_rights([])
    if image is not None:
        # The service would accept, bill and then fail it.
        problem = find_rights_problem(image, rights)
        if problems := [*find_reference_problems(image), *([problem] if problem else [])]:
            raise ConfigurationError("; ".join(problems))
    request = GenerationRequest(
        prompt=prompt,
        image_urls=[normalize_reference(image, rights.folder)] if image else [],
        mode=mode,
        aspect_ratio="16:9" if image is None and aspect_ratio == "match" else aspect_ratio,
        output_format=output_format,
        provider=provider,
    )
    await (await open_output(output, storage_options)).check_writable()
    if non_public_references(request.image_urls):
        settings = FluxKontextSettings()
        timeout = (cadence or settings.cadence()).timeout
        references = create_references(
            settings, account.base_url, timeout=timeout, fit=fit_references
        )
        with closing(references):
            submitted = await submit_own_reference(
                request, references, account, output, key, storage_options
            )
            result = await wait_for_generation(submitted, account, cadence, storage_options)
    else:
        submitted = await submit_generation(request, account, output, key, storage_options)
        result = await wait_for_generation(submitted, account, cadence, storage_options)
    return await persist_images(result, output, name, storage_options)


@flow_without_rows(
    name="style-transfer-batch", flow_run_name=name_run, on_cancellation=[log_outstanding]
)
async def style_transfer_batch(
    manifest: ManifestSource,
    output: Output,
    credentials: Account = None,
    prompt: Prompt = None,
    columns: dict[str, str] | None = None,
    styles: StyleNames = None,
    mode: Mode | None = None,
    aspect_ratio: RequestedRatio | None = None,
    output_format: OutputFormat | None = None,
    provider: Provider | None = None,
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
    manifest_format: ManifestFormat | None = None,
    text_to_image: bool = False,
    variants: Variants = None,
    checks: list[str] | None = None,
    pilot: PositiveInt | None = None,
) -> BatchSummary:
    """Restyle the images of a manifest and store the results.

    The flow first plans: it validates the rows, finds those that are new and calculates their
    price. It then runs them in waves of 250 rows, one task run a wave, within the limits of the
    account. A later run pays only for new rows and collects results that are outstanding.

    Args:
        manifest: Path or fsspec URL of a CSV, TSV, JSON Lines or Parquet file with the columns
            `id`, `image` (or `images`) and `prompt`, and optionally `style`, `mode`,
            `aspect_ratio`, `output_format`, `provider` and `output`. Or a folder, prefix or glob
            of images. Or the rows themselves: a list of dicts, or a table with the Arrow
            interface.
        output: Folder or prefix to store the images in, on any fsspec filesystem, or
            `block:s3-bucket/NAME`.
        credentials: A credentials Block, or the name of a saved one. Default: the environment.
        prompt: The prompt for rows without one.
        columns: Maps column names to those of the manifest, such as `{"image": "photo_url"}`.
        styles: Names of styles and paths of style files. Each row without a style of its own is
            made once in each of them.
        mode: Mode of rows that name none; overrides that of a style.
        aspect_ratio: Likewise, width to height of the result.
        output_format: Likewise, file format of the result.
        provider: Likewise, how the service routes the task.
        output_names: Template of the image names, such as `{style}/{id}.{ext}`, with any column.
            Default: `{id}/{style}.{ext}`, or `{id}.{ext}` for rows without a style.
        cadence: When to poll for results. Default: the environment.
        failure_policy: What to do for each fail code. Default: the default policy.
        resubmit_unknown: Pay again for rows whose submit reply was lost. They may have been
            billed already.
        skip_invalid: Run the valid rows if others are invalid. Without it, one invalid row stops
            the batch before anything is submitted.
        fit_references: Shrink local and private reference images of more than 10 MB.
        budget_usd: Most dollars that the output may cost in total, including earlier runs and
            rows that may have been billed. The run stops before the row that would exceed it.
        approve_above_usd: Pause for approval if the plan costs more dollars than this. Resume
            the flow run to approve, cancel it to decline. The run then costs at most the approved
            sum.
        callback_url: URL that the service calls when an image is ready, in place of polling.
            Default: FLUX_KONTEXT_CALLBACK_URL.
        dry_run: Stop after the plan. Rows that would be paid for count as not submitted.
        wait: `poll` waits for all results in this process. `suspend` submits all rows and
            suspends the flow run, which then holds no process and no worker slot; resumed, it
            stores the results. It needs a deployment and cannot be a subflow. `collect` submits
            all rows and ends; `collect_batch` stores the results. With more rows than the account
            has slots, both store results until the last row is submitted.
        alert_above_usd: Emit the event `flux-kontext.batch.spend-above` once this run has spent
            more dollars than this.
        partitions: Number of partitions. Each is a flow run on any worker of the work pool;
            together they stay within the limits of the account.
        partition_deployment: The deployment that runs partitions.
        storage_options: Options of the output's filesystem, or `block:aws-credentials/NAME`.
            Prefect stores parameters in plain text, so keep keys in a Block.
        manifest_format: Format of the file. Default: by its name, content type or content.
        text_to_image: Rows without a reference are meant, though other columns look like images.
        variants: Images to make of each row that names no number, each paid for.
        checks: Own checks of the images, each `module:function` of an installed module. It takes
            a Pillow image and its row, and returns flags.
        pilot: Run a sample of this many rows first, with rows of each style, then pause for
            approval of the rest, with the contact sheet of the sample beside the price.

    Returns:
        How many rows are stored, failed, unknown and outstanding, for what reasons, and the
        dollars spent.

    Raises:
        ManifestError: The manifest cannot be read or has invalid rows; nothing was submitted.
        ConfigurationError: Credentials or output are wrong, or another run is paying into an
            output with a budget; nothing was submitted.
        BatchStoppedError: The service refuses the account, nearly all rows fail, the budget is
            reached or the plan has changed since its approval; the remaining rows were not
            submitted.
        LedgerError: The ledger cannot be read or is damaged; nothing more was submitted.
    """
    if wait == "suspend":
        check_can_suspend()
    suspends = wait == "suspend" and not was_resumed()
    account = await resolve_credentials(credentials)
    options = build_row_options(
        cadence,
        failure_policy,
        account,
        resubmit_unknown=resubmit_unknown,
        budget_usd=budget_usd,
        fit_references=fit_references,
        deferred=suspends or wait == "collect",
        checks=checks,
    )
    partition_plan = (
        await plan_partitions(partitions, partition_deployment, account, wait)
        if partitions > 1
        else None
    )
    output = await open_output(output, storage_options)
    parameters = {
        "mode": mode,
        "aspect_ratio": aspect_ratio,
        "output_format": output_format,
        "provider": provider,
        "variants": None if variants is None else str(variants),
    }
    rows = Manifest(
        manifest,
        prompt,
        columns or {},
        styles,
        output_names,
        str(output),
        parameters,
        format=manifest_format,
        text_to_image=text_to_image,
        base_url=account.base_url,
    )
    plan = await plan_and_log(rows, output, account, options, pilot)
    plan.check(skip_invalid=skip_invalid)
    if dry_run:
        return complete(plan.to_summary(str(output)))
    if plan.pilot:
        sheet = await run_pilot(plan, rows, output, account, options)
        plan = await plan_and_log(rows, output, account, options)
        if not await ask_for_approval(plan, rows, output, account, options, sheet):
            return decline(after_pilot=True)
        options = plan.with_budget_cap(options, 0)
    elif approve_above_usd is not None:
        if plan.price > approve_above_usd and not await ask_for_approval(
            plan, rows, output, account, options
        ):
            return decline()
        options = plan.with_budget_cap(options, approve_above_usd)
    async with (
        run_partitions(
            partition_plan, plan, rows, output, account, options, alert_above_usd
        ) as remaining,
        open_batch(
            output,
            remaining.account,
            remaining.options,
            plan,
            callback_url=callback_url,
            alert_above_usd=remaining.alert_above_usd,
            suspends=suspends,
            partition_totals=remaining.partition_totals,
        ) as (session, slots),
    ):
        if remaining.lease is not None:
            remaining.lease.stop_when_lost(session.submitter)
        waves = run_wave if remaining.partition_totals is None else run_remaining
        summary = await run_batch(session, rows.rows(), waves, concurrent_tasks=slots)
    if remaining.partition_totals is not None:
        summary.spent += remaining.partition_totals.spent
        summary.seconds += remaining.partition_totals.seconds
    get_run_logger().info("%s.", summary)
    if suspends and summary.outstanding:
        await suspend_batch(output)
    return complete(summary)


@flow_without_rows(name="retry-failed", flow_run_name=name_run, on_cancellation=[log_outstanding])
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
    """Run the failed rows of a batch again, and no other rows.

    The failed rows are in `failed.csv` beside the images. Rows that violate the content rules are
    not paid for again until their prompt in that file is changed.

    Args:
        output: The output of the batch.
        credentials: A credentials Block, or the name of a saved one. Default: the environment.
        prompt: The prompt for rows without one.
        styles: The style files that the batch was run with. The rows name their styles.
        cadence: When to poll for results. Default: the environment.
        failure_policy: What to do for each fail code. Default: the default policy.
        fit_references: Shrink local and private reference images of more than 10 MB.
        budget_usd: Most dollars that the output may cost in total, including earlier runs and
            rows that may have been billed. The run stops before the row that would exceed it.
        storage_options: Options of the output's filesystem, or `block:aws-credentials/NAME`.
            Prefect stores parameters in plain text, so keep keys in a Block.

    Returns:
        The counts of the rows that were run again.

    Raises:
        ManifestError: No batch has run into the output, or its file of failed rows is damaged.
        BatchStoppedError: The service refuses the account, or nearly all rows fail again.
        LedgerError: The ledger cannot be read or is damaged; nothing more was submitted.
    """
    account = await resolve_credentials(credentials)
    options = build_row_options(
        cadence,
        failure_policy,
        account,
        retry_failed=True,
        budget_usd=budget_usd,
        fit_references=fit_references,
    )
    output = await open_output(output, storage_options)
    rows = await read_failed_manifest(output, prompt, styles, account.base_url)
    if rows is None:
        return complete(BatchSummary(output=str(output)))
    # failed.csv also has the rows skipped as invalid; they must not stop the others.
    plan = await plan_and_log(rows, output, account, options)
    plan.check(skip_invalid=True)
    async with open_batch(output, account, options, plan) as (session, slots):
        summary = await run_batch(session, rows.rows(), run_wave, concurrent_tasks=slots)
    get_run_logger().info("%s.", summary)
    return complete(summary)


@flow_without_rows(name="collect-batch", flow_run_name=name_run)
async def collect_batch(
    output: Output,
    credentials: Account = None,
    cadence: PollingCadence | None = None,
    storage_options: StorageOptions = None,
) -> BatchSummary:
    """Store the outstanding results of earlier runs. Pays for nothing.

    The flow waits for the results that runs have paid for and left, downloads and stores them.
    When all are stored, it resumes the flow runs that are suspended for this output.

    Args:
        output: The output of the batch.
        credentials: A credentials Block, or the name of a saved one. Default: the environment.
        cadence: When to poll for results. Default: the environment.
        storage_options: Options of the output's filesystem, or `block:aws-credentials/NAME`.
            Prefect stores parameters in plain text, so keep keys in a Block.

    Returns:
        The counts of the rows that were outstanding.

    Raises:
        ConfigurationError: Credentials or output are wrong.
        LedgerError: The ledger cannot be read.
    """
    account = await resolve_credentials(credentials)
    options = build_row_options(cadence, None, account)
    output = await open_output(output, storage_options)
    async with open_batch(output, account, options, listens=False) as (session, slots):
        summary = await run_collection(session, run_wave, concurrent_tasks=slots)
    get_run_logger().info("%s.", summary)
    if summary.outstanding:
        await emit_expiring_results(output)
    elif resumed := await resume_suspended(output):
        get_run_logger().info("Resumed suspended flow runs: %s.", ", ".join(map(str, resumed)))
    return complete(summary)
