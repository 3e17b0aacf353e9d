"""The flow of one partition of a batch, which `style_transfer_batch` starts.

Annotations are real objects here, not strings, as in `flows`.
"""

from collections.abc import Iterable, Iterator
from uuid import UUID

from prefect import flow
from prefect.runtime import flow_run
from pydantic import BaseModel, Field, PositiveInt

from prefect_flux_kontext.batch.runner import run_partition_rows
from prefect_flux_kontext.batch.summary import BatchSummary
from prefect_flux_kontext.credentials import resolve_credentials
from prefect_flux_kontext.errors import ConfigurationError
from prefect_flux_kontext.ledger.heartbeat import keep_heartbeat
from prefect_flux_kontext.ledger.store import open_ledger_store
from prefect_flux_kontext.manifest.row import RefusedRow, Row
from prefect_flux_kontext.manifest.tables import ManifestSource
from prefect_flux_kontext.models import Mode, RequestedRatio
from prefect_flux_kontext.orchestration.batch_run import (
    acknowledge_termination,
    build_row_options,
    forward_core_logs,
    open_account_session,
    run_wave,
)
from prefect_flux_kontext.orchestration.parameters import (
    Account,
    AdvancedOptions,
    Output,
    Prompt,
    StyleNames,
    build_manifest,
    open_output,
)
from prefect_flux_kontext.orchestration.partitions.files import read_shared_rows, report_progress
from prefect_flux_kontext.orchestration.partitions.leases import (
    get_limit_name,
    lease_slots,
)
from prefect_flux_kontext.orchestration.suspension import log_outstanding


class Partition(BaseModel):
    """Which partition of a batch to run, and what it may use."""

    number: PositiveInt = Field(description="The number of the partition, from 1.")
    of: PositiveInt = Field(description="The number of partitions.")
    budget_usd: float | None = Field(
        default=None, description="Dollars that it may spend. Default: no limit."
    )
    budget_by: dict[str, dict[str, float]] = Field(
        default_factory=dict, description="Dollars that it may spend by column and value."
    )

    @property
    def has_budget(self) -> bool:
        """Whether there is a limit on what it may spend."""
        return self.budget_usd is not None or bool(self.budget_by)


@flow(name="style-transfer-partition", on_cancellation=[log_outstanding])
async def style_transfer_partition(
    partition: Partition,
    manifest: ManifestSource,
    output: Output,
    credentials: Account = None,
    styles: StyleNames = None,
    prompt: Prompt = None,
    mode: Mode | None = None,
    aspect_ratio: RequestedRatio | None = None,
    columns: dict[str, str] | None = None,
    advanced: AdvancedOptions | None = None,
    rows_file: str | None = None,
) -> BatchSummary:
    """Run one partition of a batch with a leased share of the account.

    `style_transfer_batch` starts this flow, passes its own parameters on, and finishes the rows
    that a partition leaves. Invalid rows are left to the batch.

    Args:
        partition: Which rows to run, and the dollars that they may cost.
        manifest: The manifest of the batch.
        output: Folder or prefix to store the images in.
        credentials: A credentials Block, or the name of a saved one.
        styles: Styles for rows without a style of their own.
        prompt: The prompt for rows without one.
        mode: Mode of rows that name none.
        aspect_ratio: Width to height of the results of rows that name none.
        columns: Maps column names to those of the manifest.
        advanced: The rare options of the batch.
        rows_file: The file in the output that has the rows in place of `manifest`.

    Returns:
        The counts of the partition's rows.

    Raises:
        ConfigurationError: Credentials, output or limit are wrong; or the partition has a share
            of a budget and ran before, so that the rest of its share is not known. Nothing was
            submitted.
        BatchStoppedError: The service refuses the account, nearly all rows fail, or the lease was
            lost; the remaining rows were not submitted.
        LedgerError: The ledger cannot be read or is damaged; nothing more was submitted.
        ManifestError: The rows are not in the output any more; nothing was submitted.
    """
    if partition.has_budget and flow_run.run_count > 1:
        raise ConfigurationError(
            "This partition ran before and may have spent its share of the budget. The batch, or "
            "a later run of it, finishes its rows."
        )
    rare = advanced or {}
    account = await resolve_credentials(credentials)
    options = build_row_options(
        rare,
        account,
        budget_usd=partition.budget_usd,
        budget_by=partition.budget_by,
        is_share=True,
    )
    output = await open_output(output, rare.get("storage_options"))
    await output.check_writable()
    store, name = open_ledger_store(output), UUID(flow_run.id).hex
    limit = rare.get("account_limit") or get_limit_name(account)
    if rows_file is not None:
        manifest = await read_shared_rows(output, rows_file)
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
    with forward_core_logs():
        async with (
            keep_heartbeat(store, name),
            lease_slots(limit, account) as lease,
            open_account_session(
                output,
                account,
                options,
                rare.get("callback_url"),
                listens=False,
                limiter=lease.limiter,
                is_whole=False,
            ) as session,
            report_progress(store, name, session.progress),
        ):
            lease.stop_when_lost(session.submitter)
            with acknowledge_termination():
                return await run_partition_rows(
                    session,
                    rows_for_partition(rows.rows(), partition),
                    run_wave,
                    concurrent_tasks=account.concurrent_tasks,
                )


def rows_for_partition(rows: Iterable[Row | RefusedRow], partition: Partition) -> Iterator[Row]:
    """Yield the rows of a partition: of n partitions, each has every nth row.

    Partitions are therefore of equal size, to within one row.
    """
    for index, row in enumerate(rows):
        if index % partition.of == partition.number - 1 and isinstance(row, Row):
            yield row
