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
from prefect_flux_kontext.batch.waves import Wave
from prefect_flux_kontext.client.polling import PollingCadence
from prefect_flux_kontext.credentials import resolve_credentials
from prefect_flux_kontext.errors import ConfigurationError
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
    Batch,
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
    AccountLimit,
    AdvancedOptions,
    GroupBudgets,
    Output,
    Prompt,
    StorageOptions,
    StyleName,
    StyleNames,
    build_manifest,
    flow_without_rows,
    open_output,
)
from prefect_flux_kontext.orchestration.partitions.coordinator import (
    plan_partitions,
    run_partitions,
)
from prefect_flux_kontext.orchestration.run_page import complete, decline, name_run
from prefect_flux_kontext.orchestration.suspension import (
    check_can_suspend,
    log_outstanding,
    resume_suspended,
    suspend_batch,
    was_resumed,
)
from prefect_flux_kontext.references.location import normalize_reference
from prefect_flux_kontext.references.resolver import create_references
from prefect_flux_kontext.references.rights import find_rights, find_rights_problem
from prefect_flux_kontext.settings import FluxKontextSettings
from prefect_flux_kontext.styles.styles import get_builtin_style
from prefect_flux_kontext.tasks import persist_images, submit_generation, wait_for_generation

__all__ = [
    "AdvancedOptions",
    "collect_batch",
    "retry_failed",
    "style_transfer",
    "style_transfer_batch",
]


@flow_without_rows(name="style-transfer", flow_run_name=name_run)
async def style_transfer(
    prompt: Prompt = None,
    output: Output = None,
    image: str | None = None,
    credentials: Account = None,
    style: StyleName = None,
    mode: Mode = "pro",
    aspect_ratio: RequestedRatio = "match",
    output_format: OutputFormat = "jpeg",
    name: str | None = None,
    key: str | None = None,
    provider: Provider = "auto",
    fit_references: bool = False,
    cadence: PollingCadence | None = None,
    storage_options: StorageOptions = None,
) -> list[StoredImage]:
    """Restyle one image, or create one from text alone.

    The flow submits one generation, waits for its result and stores the images. The generation is
    billed from the submit on.

    Args:
        prompt: What to create, 1 to 10,000 characters. With a style, its prompt follows that of
            the style and may be left out.
        output: Folder or prefix to store the images in, on any fsspec filesystem, or
            block:s3-bucket/NAME.
        image: The reference image: a URL, an object in a bucket, or a local file, which needs a
            staging location. Without one, the prompt alone makes the image.
        credentials: A credentials Block, or the name of a saved one. Default: the environment.
        style: The name of a built-in style.
        mode: Pro for higher quality, max for balanced quality and speed.
        aspect_ratio: Width to height of the result. Match: the ratio nearest to that of the
            reference image, or 16:9 without one.
        output_format: File format of the result.
        name: File name without extension. Default: the task id.
        key: Makes equal requests different ones. Without it, a request that this output has
            already is not paid for again.
        provider: How the service routes the task.
        fit_references: Shrink a local or private image of more than 10 MB.
        cadence: When to poll for the result. Default: the environment.
        storage_options: Options of the output's filesystem, or block:aws-credentials/NAME.
            Prefect stores parameters in plain text, so keep keys in a Block.

    Returns:
        The stored images.

    Raises:
        FluxKontextError: A step failed; the three tasks list the errors.
    """
    if output is None:
        raise ConfigurationError("Give an output: the folder or prefix to store the image in.")
    if style is not None:
        prompt = get_builtin_style(style).render_prompt(prompt, {})
    if prompt is None:
        raise ConfigurationError("Give a prompt, a style, or both.")
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
    settings = FluxKontextSettings()
    timeout = (cadence or settings.cadence()).timeout
    references = create_references(settings, account.base_url, timeout=timeout, fit=fit_references)
    with closing(references):
        submitted = await submit_generation(
            request, account, output, key, storage_options, references=references
        )
        result = await wait_for_generation(submitted, account, cadence, storage_options)
    return await persist_images(result, output, name, storage_options)


@flow_without_rows(
    name="style-transfer-batch", flow_run_name=name_run, on_cancellation=[log_outstanding]
)
async def style_transfer_batch(
    manifest: ManifestSource,
    output: Output,
    credentials: Account = None,
    styles: StyleNames = None,
    prompt: Prompt = None,
    mode: Mode | None = None,
    aspect_ratio: RequestedRatio | None = None,
    budget_usd: NonNegativeFloat | None = None,
    approve_above_usd: NonNegativeFloat | None = None,
    dry_run: bool = False,
    skip_invalid: bool = False,
    columns: dict[str, str] | None = None,
    wait: Literal["poll", "suspend", "collect"] = "poll",
    partitions: PositiveInt = 1,
    advanced: AdvancedOptions | None = None,
) -> BatchSummary:
    """Restyle the images of a manifest and store the results.

    The flow first plans: it validates the rows, finds those that are new and calculates their
    price. It then runs them in waves of 250 rows, one task run a wave, within the limits of the
    account. A later run pays only for new rows and collects results that are outstanding.

    Args:
        manifest: A folder, prefix or glob of images. Or a CSV, TSV, JSON Lines or Parquet file,
            by path or fsspec URL, with the columns id, image (or images) and prompt, and
            optionally style, mode, aspect_ratio, output_format, provider and output. Or the rows
            themselves: a list of dicts, or a table with the Arrow interface.
        output: Folder or prefix to store the images in, on any fsspec filesystem, or
            block:s3-bucket/NAME.
        credentials: A credentials Block, or the name of a saved one. Default: the environment.
        styles: Names of styles and paths of style files. Each row without a style of its own is
            made once in each of them.
        prompt: The prompt for rows without one. With a style, it follows that of the style.
        mode: Pro for higher quality, max for balanced quality and speed. For rows that name
            none; overrides that of a style.
        aspect_ratio: Likewise, width to height of the result.
        budget_usd: Most dollars that the output may cost in total, including earlier runs and
            rows that may have been billed. The run stops before the row that would exceed it.
        approve_above_usd: Pause for approval if the plan costs more dollars than this. Resume
            the flow run to approve, cancel it to decline. The run then costs at most the approved
            sum.
        dry_run: Stop after the plan. Rows that would be paid for count as not submitted.
        skip_invalid: Run the valid rows if others are invalid. Without it, one invalid row stops
            the batch before anything is submitted.
        columns: Maps column names to those of the manifest, such as {"image": "photo_url"}.
        wait: Poll waits for all results in this process. Suspend submits all rows and suspends
            the flow run, which then holds no process and no worker slot; resumed, it stores the
            results. It needs a deployment and cannot be a subflow. Collect submits all rows and
            ends; the flow collect_batch stores the results. With more rows than the account has
            slots, both store results until the last row is submitted.
        partitions: Number of partitions. Each is a flow run on any worker of the work pool;
            together they stay within the limits of the account.
        advanced: Names and format of images, cadence, failure policy, callbacks and more: see
            AdvancedOptions. A call may give each as a keyword.

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
    rare = advanced or {}
    if wait == "suspend":
        check_can_suspend()
    suspends = wait == "suspend" and not was_resumed()
    account = await resolve_credentials(credentials)
    options = build_row_options(
        rare,
        account,
        budget_usd=budget_usd,
        budget_by=rare.get("budget_by") or {},
        deferred=suspends or wait == "collect",
    )
    partition_plan = await plan_partitions(partitions, rare, account, wait)
    output = await open_output(output, rare.get("storage_options"))
    rows = build_manifest(
        manifest,
        output,
        account,
        rare,
        prompt=prompt,
        columns=columns,
        styles=styles,
        mode=mode,
        aspect_ratio=aspect_ratio,
    )
    batch = Batch(rows, output, account, options, rare.get("account_limit"))
    plan = await plan_and_log(batch, rare.get("pilot"))
    plan.check(skip_invalid=skip_invalid)
    if dry_run:
        return complete(plan.to_summary(str(output)))
    if plan.pilot:
        sheet = await run_pilot(plan, batch)
        plan = await plan_and_log(batch)
        if not await ask_for_approval(plan, batch, sheet):
            return decline(after_pilot=True)
        batch = batch._replace(options=plan.with_budget_cap(options, 0))
    elif approve_above_usd is not None:
        if plan.price > approve_above_usd and not await ask_for_approval(plan, batch):
            return decline()
        batch = batch._replace(options=plan.with_budget_cap(options, approve_above_usd))
    alert_above_usd = rare.get("alert_above_usd")
    async with (
        run_partitions(partition_plan, plan, batch, alert_above_usd) as remaining,
        open_batch(
            output,
            account,
            remaining.options,
            plan,
            callback_url=rare.get("callback_url"),
            alert_above_usd=remaining.alert_above_usd,
            suspends=suspends,
            partition_totals=remaining.partition_totals,
            account_limit=remaining.limit,
        ) as (session, slots),
    ):
        # Partitions leave mostly empty waves, so these are no task runs.
        waves = run_wave if remaining.partition_totals is None else Wave.run
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
    budget_usd: NonNegativeFloat | None = None,
    prompt: Prompt = None,
    styles: StyleNames = None,
    fit_references: bool = False,
    failure_policy: FailurePolicy | None = None,
    cadence: PollingCadence | None = None,
    budget_by: GroupBudgets = None,
    spend_by: list[str] | None = None,
    storage_options: StorageOptions = None,
    account_limit: AccountLimit = None,
) -> BatchSummary:
    """Run the failed rows of a batch again, and no other rows.

    The failed rows are in `failed.csv` beside the images. Rows that violate the content rules are
    not paid for again until their prompt in that file is changed.

    Args:
        output: The output of the batch.
        credentials: A credentials Block, or the name of a saved one. Default: the environment.
        budget_usd: Most dollars that the output may cost in total, including earlier runs and
            rows that may have been billed. The run stops before the row that would exceed it.
        prompt: The prompt for rows without one.
        styles: The style files that the batch was run with. The rows name their styles.
        fit_references: Shrink local and private reference images of more than 10 MB.
        failure_policy: What to do for each fail code. Default: the default policy.
        cadence: When to poll for results. Default: the environment.
        budget_by: The same for the rows with a value in a column, such as
            {"team": {"blue": 20}}. When it is reached, these rows are not submitted, and the
            others go on.
        spend_by: Columns by whose values the summary shows what was spent.
        storage_options: Options of the output's filesystem, or block:aws-credentials/NAME.
            Prefect stores parameters in plain text, so keep keys in a Block.
        account_limit: Name of a global concurrency limit in Prefect with the account's number of
            tasks. Flow runs with the same limit share the account. Default: each run uses the
            whole account.

    Returns:
        The counts of the rows that were run again.

    Raises:
        ManifestError: No batch has run into the output, or its file of failed rows is damaged.
        BatchStoppedError: The service refuses the account, or nearly all rows fail again.
        LedgerError: The ledger cannot be read or is damaged; nothing more was submitted.
    """
    account = await resolve_credentials(credentials)
    options = build_row_options(
        {
            "cadence": cadence,
            "failure_policy": failure_policy,
            "fit_references": fit_references,
            "spend_by": spend_by or [],
        },
        account,
        retry_failed=True,
        budget_usd=budget_usd,
        budget_by=budget_by or {},
    )
    output = await open_output(output, storage_options)
    rows = await read_failed_manifest(output, prompt, styles, account.base_url)
    if rows is None:
        return complete(BatchSummary(output=str(output)))
    # failed.csv also has the rows skipped as invalid; they must not stop the others.
    plan = await plan_and_log(Batch(rows, output, account, options, account_limit))
    plan.check(skip_invalid=True)
    async with open_batch(output, account, options, plan, account_limit=account_limit) as (
        session,
        slots,
    ):
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
        storage_options: Options of the output's filesystem, or block:aws-credentials/NAME.
            Prefect stores parameters in plain text, so keep keys in a Block.

    Returns:
        The counts of the rows that were outstanding.

    Raises:
        ConfigurationError: Credentials or output are wrong.
        LedgerError: The ledger cannot be read.
    """
    account = await resolve_credentials(credentials)
    options = build_row_options({"cadence": cadence}, account)
    output = await open_output(output, storage_options)
    async with open_batch(output, account, options, listens=False) as (session, slots):
        summary = await run_collection(session, run_wave, concurrent_tasks=slots)
    get_run_logger().info("%s.", summary)
    if summary.outstanding:
        await emit_expiring_results(output)
    elif resumed := await resume_suspended(output):
        get_run_logger().info("Resumed suspended flow runs: %s.", ", ".join(map(str, resumed)))
    return complete(summary)
