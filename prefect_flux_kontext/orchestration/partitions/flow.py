"""The flow over one partition of a batch, started by `style_transfer_batch`."""

from collections.abc import Iterable, Iterator

from prefect import flow
from prefect.context import FlowRunContext
from pydantic import BaseModel, Field, PositiveInt

from prefect_flux_kontext.batch.policy import FailurePolicy
from prefect_flux_kontext.batch.runner import run_partition_rows
from prefect_flux_kontext.batch.session import open_session
from prefect_flux_kontext.batch.summary import BatchSummary
from prefect_flux_kontext.callbacks.options import resolve_callback_options
from prefect_flux_kontext.client.polling import PollingCadence
from prefect_flux_kontext.credentials import resolve_credentials
from prefect_flux_kontext.errors import ConfigurationError
from prefect_flux_kontext.ledger.heartbeat import keep_heartbeat
from prefect_flux_kontext.ledger.store import open_ledger_store
from prefect_flux_kontext.manifest.reader import Manifest
from prefect_flux_kontext.manifest.row import RefusedRow, Row
from prefect_flux_kontext.manifest.tables import ManifestSource
from prefect_flux_kontext.orchestration.batch_run import (
    build_row_options,
    forward_core_logs,
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
from prefect_flux_kontext.orchestration.partitions.leases import Share, lease_slots
from prefect_flux_kontext.orchestration.partitions.progress import report_progress
from prefect_flux_kontext.orchestration.suspension import log_outstanding
from prefect_flux_kontext.settings import FluxKontextSettings

# Annotations are real objects here, not strings, as in `flows`.


class Partition(BaseModel):
    """Which partition of a batch it is, and what it may use."""

    number: PositiveInt = Field(description="From 1.")
    of: PositiveInt = Field(description="How many partitions there are.")
    slots: PositiveInt = Field(description="Tasks that it may run at once; it leases them.")
    requests_per_minute: PositiveInt = Field(description="Requests that go with them.")
    budget_usd: float | None = Field(
        default=None, description="Dollars that it may spend; none for as many as it takes."
    )


@flow(name="style-transfer-partition", on_cancellation=[log_outstanding])
async def style_transfer_partition(
    partition: Partition,
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
    fit_references: bool = False,
    callback_url: str | None = None,
    storage_options: StorageOptions = None,
) -> BatchSummary:
    """Run every so-manieth row of a manifest with a leased share of the account.

    The batch that starts it tells the whole and finishes what a partition leaves. Rows that are
    invalid are left to it.

    Args:
        partition: Which rows, and what they may use.
        manifest: As the batch has it; and so all that follows.
        output: Where the images go.
        credentials: The account.
        prompt: The prompt for rows that have none of their own.
        columns: The manifest's own names for columns.
        styles: Styles for rows that name none.
        output_names: Template of the images' names.
        cadence: When to ask how a task is doing.
        failure_policy: What to do for each fail code.
        resubmit_unknown: Pay again for rows whose submit's reply was lost.
        fit_references: Shrink local and private reference images that are over 10 MB.
        callback_url: Where the service is to call when an image is ready.
        storage_options: The options of the output's filesystem.

    Returns:
        What became of the partition's rows.

    Raises:
        ConfigurationError: Credentials, output or limit are wrong; or it has a share of a budget
            and has run before, so that nobody knows what is left of it. Nothing was submitted.
        BatchStoppedError: The service refuses the account, nearly all rows fail, or the lease was
            lost; the rest was not submitted.
        LedgerError: The record of what was paid cannot be trusted; nothing more was submitted.
    """
    context = FlowRunContext.get()
    assert context is not None and context.flow_run is not None  # noqa: S101, PT018 - it is a flow
    run = context.flow_run
    if partition.budget_usd is not None and run.run_count > 1:
        raise ConfigurationError(
            "This partition ran before and may have spent its share of the budget. Its batch, or "
            "a later run of it, finishes its rows."
        )
    settings = FluxKontextSettings()
    options = build_row_options(
        cadence,
        failure_policy,
        fit_references=fit_references,
        resubmit_unknown=resubmit_unknown,
        share_usd=partition.budget_usd,
    )
    share = Share(partition.slots, partition.requests_per_minute)
    account = share.of(await resolve_credentials(credentials))
    output = await open_output(output, storage_options)
    await output.check_writable()
    store, name = open_ledger_store(output), run.id.hex
    callbacks = resolve_callback_options(
        settings, url=callback_url, secret=account.callback_secret, listens=False
    )
    rows = Manifest(manifest, prompt, columns or {}, styles, output_names, str(output))
    with forward_core_logs():
        async with (
            keep_heartbeat(store, name),
            lease_slots(account, share.slots) as lease,
            open_session(
                account.get_client(), output, options, settings, callbacks, whole=False
            ) as session,
            report_progress(store, name, session.rows.progress),
        ):
            lease.held_for(session.submitter)
            return await run_partition_rows(
                session,
                rows_for_partition(rows.rows(), partition),
                run_wave,
                concurrent_tasks=share.slots,
            )


def rows_for_partition(rows: Iterable[Row | RefusedRow], partition: Partition) -> Iterator[Row]:
    """The rows of a partition: they are dealt like cards, so that partitions are of one size."""
    for place, row in enumerate(rows):
        if place % partition.of == partition.number - 1 and isinstance(row, Row):
            yield row
