"""The partitions of a batch: plan them, start their flow runs, and restart those that died.

There is no scheduler here. What partitions leave, the batch itself runs afterwards.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import get_run_logger
from prefect.blocks.core import Block
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.context import FlowRunContext
from prefect.deployments import arun_deployment
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run
from pydantic import BaseModel

from prefect_flux_kontext.batch.budget import ensure_sole_run
from prefect_flux_kontext.batch.index import PlannedAction
from prefect_flux_kontext.batch.summary import BatchSummary
from prefect_flux_kontext.errors import ConfigurationError
from prefect_flux_kontext.ledger.heartbeat import is_alive, keep_heartbeat
from prefect_flux_kontext.ledger.store import RecordStore, open_ledger_store
from prefect_flux_kontext.models import utc_now
from prefect_flux_kontext.orchestration.approval import Batch, build_plan
from prefect_flux_kontext.orchestration.batch_run import (
    PartitionTotals,
    create_spend_alarm,
    emit_started,
)
from prefect_flux_kontext.orchestration.partitions.files import (
    read_progress,
    remove_progress,
    share_rows,
)
from prefect_flux_kontext.orchestration.partitions.flow import Partition, style_transfer_partition
from prefect_flux_kontext.orchestration.partitions.leases import (
    check_limit,
    get_limit_name,
)
from prefect_flux_kontext.orchestration.run_page import progress_artifact
from prefect_flux_kontext.settings import FluxKontextSettings
from prefect_flux_kontext.styles.styles import is_style_file

if TYPE_CHECKING:
    from uuid import UUID

    from prefect_flux_kontext.batch.planning import Plan
    from prefect_flux_kontext.batch.policy import RowOptions
    from prefect_flux_kontext.credentials import FluxKontextCredentials
    from prefect_flux_kontext.orchestration.parameters import AdvancedOptions

DEFAULT_PARTITION_DEPLOYMENT = "style-transfer-partition/partition-of-batch"

CHECK_INTERVAL_SECONDS = 5.0
"""Between two checks of all partitions."""

HEARTBEAT_TIMEOUT_SECONDS = 30.0
"""Without a heartbeat for this long, a partition that Prefect says is running counts as dead."""

START_TIMEOUT_SECONDS = 300.0
"""Partitions that no worker has begun after this long are cancelled, if no other is running."""

_MAX_STARTS = 2
"""A partition that dies is started once more; after that, the batch itself runs its rows."""


@dataclass(frozen=True)
class PartitionPlan:
    """How to run a batch in partitions, each with these parameters."""

    partitions: int
    limit: str  # the name of the account's limit
    deployment: str
    parameters: dict[str, Any]


async def plan_partitions(
    partitions: int, advanced: AdvancedOptions, account: FluxKontextCredentials, wait: str
) -> PartitionPlan | None:
    """Check that the current batch can run in partitions, and plan them; None for one partition.

    Raises:
        ConfigurationError: It cannot run in partitions; the message says why.
    """
    if partitions == 1:
        return None
    deployment = advanced.get("partition_deployment") or DEFAULT_PARTITION_DEPLOYMENT
    if wait != "poll":
        raise ConfigurationError(
            f'wait="{wait}" is not possible with partitions. Use wait="poll", or partitions=1.'
        )
    if FluxKontextSettings().callback_listen is not None:
        raise ConfigurationError(
            "Partitions cannot receive callbacks themselves. Unset FLUX_KONTEXT_CALLBACK_LISTEN "
            "and run a receiver: flux-kontext receive OUTPUT"
        )
    parameters = _collect_parameters()
    async with get_client() as client:
        try:
            await client.read_deployment_by_name(deployment)
        except (ObjectNotFound, ValueError):
            raise ConfigurationError(
                f"There is no deployment {deployment!r} to run partitions. Create it with "
                "`flux-kontext deploy MANIFEST --output OUTPUT`, or set "
                "partition_deployment to one of yours. Nothing was submitted."
            ) from None
    limit = advanced.get("account_limit") or get_limit_name(account)
    await check_limit(account, limit, runs=partitions)
    return PartitionPlan(partitions, limit, deployment, parameters)


def _collect_parameters() -> dict[str, Any]:
    """Return the parameters of the current flow run that its partitions get too, as JSON."""
    context = FlowRunContext.get()
    own = (context.parameters if context is not None else None) or {}
    names: Any = style_transfer_partition.parameters.properties
    passed = {
        name: _convert_to_json(name, own[name])
        for name in names
        if name in own and name != "manifest"
    }
    passed["output"] = _make_absolute(passed["output"])
    if isinstance(own["manifest"], str):  # else `share_rows` adds what names it
        passed["manifest"] = _make_absolute(own["manifest"])
    styles = passed.get("styles")
    if styles is not None:
        named = [styles] if isinstance(styles, str) else styles
        passed["styles"] = [
            _make_absolute(name) if is_style_file(name) else name for name in named
        ]
    return passed


def _convert_to_json(name: str, value: Any) -> Any:
    if isinstance(value, Block):
        document = value._block_document_id  # noqa: SLF001 - Prefect has no public name
        if document is None:
            raise ConfigurationError(
                f"The {name} of a batch in partitions cannot be an unsaved Block, because each "
                "partition loads the Block. Save it and give its name."
            )
        return {"$ref": {"block_document_id": str(document)}}
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {key: _convert_to_json(key, item) for key, item in value.items()}
    if not isinstance(value, str | int | float | list | dict | None):
        raise ConfigurationError(
            f"The {name} of a batch in partitions cannot be {value!r:.80}, because it is sent to "
            "other machines. Give it as text."
        )
    return value


def _make_absolute(location: Any) -> Any:
    # The worker that runs a partition has another working directory.
    if not isinstance(location, str) or "://" in location or location.startswith("block:"):
        return location
    return str(Path(location).expanduser().absolute())


@dataclass(frozen=True)
class RemainingWork:
    """What is left to the batch itself when its partitions have ended."""

    options: RowOptions
    alert_above_usd: float | None  # None also if the event was emitted already
    partition_totals: PartitionTotals | None = None  # None without partitions
    limit: str | None = None  # the limit that the batch leases slots of, if any


@asynccontextmanager
async def run_partitions(
    partition_plan: PartitionPlan | None, plan: Plan, batch: Batch, alert_above_usd: float | None
) -> AsyncIterator[RemainingWork]:
    """Run the partitions of a batch to their end, and yield what is left to the batch itself.

    Raises:
        ConfigurationError: There is a budget, and another run is paying into the output.
        LedgerError: The ledger cannot be read or written.
        StorageError: The rows cannot be written for the partitions.
    """
    if partition_plan is None:
        yield RemainingWork(batch.options, alert_above_usd, limit=batch.account_limit)
        return
    started_at, since = asyncio.get_running_loop().time(), utc_now()
    emit_started(str(batch.output), plan)
    total = BatchSummary(output=str(batch.output))
    alarm = create_spend_alarm(total, lambda: total.spent, alert_above_usd)
    if plan.to_pay:
        async with share_rows(batch.rows, batch.output) as shared:
            parameters = partition_plan.parameters | shared
            partition_plan = replace(partition_plan, parameters=parameters)
            await _run_all(partition_plan, plan, batch, total, alarm)
    new_plan = await build_plan(batch)
    # The ledger, not the records of the partitions, says what was spent.
    total.spent = round(new_plan.spent - plan.spent, 6)
    alarm()
    was_alerted = alert_above_usd is not None and total.spent > alert_above_usd
    seconds = asyncio.get_running_loop().time() - started_at
    unsettled = (
        new_plan.actions[PlannedAction.OUTSTANDING] + new_plan.actions[PlannedAction.UNKNOWN]
    )
    has_rows = bool(new_plan.to_pay or unsettled)
    if has_rows:
        get_run_logger().info("Plan for the rows that the partitions have left:\n%s", new_plan)
    yield RemainingWork(
        replace(batch.options, since=since),
        None if was_alerted else alert_above_usd,
        PartitionTotals(total.spent, seconds, new_plan.spending, plan.spending, plan.balance),
        partition_plan.limit if has_rows else None,
    )


def _build_partitions(
    partition_plan: PartitionPlan, plan: Plan, options: RowOptions
) -> list[Partition]:
    count = min(partition_plan.partitions, plan.to_pay)

    def share(dollars: float, spent: float) -> float:
        return math.floor(max(0.0, dollars - spent) / count * 1_000_000) / 1_000_000

    budget = None if options.budget_usd is None else share(options.budget_usd, plan.spent)
    budget_by: dict[str, dict[str, float]] = {}
    for column, value, dollars, spent, _ in plan.list_budgets():
        budget_by.setdefault(column, {})[value] = share(dollars, spent)
    return [
        Partition(number=number, of=count, budget_usd=budget, budget_by=budget_by)
        for number in range(1, count + 1)
    ]


async def _run_all(
    partition_plan: PartitionPlan,
    plan: Plan,
    batch: Batch,
    total: BatchSummary,
    alarm: Callable[[], None],
) -> None:
    store = open_ledger_store(batch.output)
    name = flow_run.name or "batch"
    async with keep_heartbeat(store) as heartbeat, get_client() as client:
        if batch.options.has_budget:
            await ensure_sole_run(store, heartbeat.owner, "a budget cannot be kept")
        running = [
            PartitionRuns(client, store, partition, partition_plan, name)
            for partition in _build_partitions(partition_plan, plan, batch.options)
        ]
        try:
            for partition in running:
                await partition.start()
            async with progress_artifact(total, plan.rows, total, alarm):
                await _watch(running, total)
        finally:
            ending = [partition.end() for partition in running]
            await asyncio.shield(asyncio.gather(*ending))


async def _watch(running: list[PartitionRuns], total: BatchSummary) -> None:
    """Check partitions until all have ended, or the remaining ones were not begun in time."""
    clock = asyncio.get_running_loop().time
    last_running_at = clock()
    while not all(partition.has_ended for partition in running):
        await asyncio.sleep(CHECK_INTERVAL_SECONDS)
        for partition in running:
            await partition.check()
        counted = BatchSummary(output=total.output)
        counted.spent = sum([await partition.add_to(counted) for partition in running])
        for name, value in counted:
            setattr(total, name, value)
        if any(partition.has_begun and not partition.has_ended for partition in running):
            last_running_at = clock()
        elif clock() - last_running_at > START_TIMEOUT_SECONDS:
            get_run_logger().warning(
                "No worker has begun the remaining partitions, so the batch runs their rows. "
                "Check that the work pool has enough workers and a high enough concurrency limit."
            )
            return


class PartitionRuns:
    """A partition and its flow runs, of which the last one counts.

    It has begun once a worker has begun that one, and ended when no further one will run.
    """

    def __init__(
        self,
        client: PrefectClient,
        store: RecordStore,
        partition: Partition,
        partition_plan: PartitionPlan,
        name: str,
    ) -> None:
        self.has_ended = self.has_begun = False
        self._client = client
        self._store = store
        self._partition = partition
        self._plan = partition_plan
        self._name = f"{name}-partition-{partition.number}-of-{partition.of}"
        self._runs: list[UUID] = []
        self._silent_since: float | None = None

    async def start(self) -> None:
        """Start a flow run of the partition."""
        run: Any = await arun_deployment(
            self._plan.deployment,
            parameters={
                **self._plan.parameters,
                "partition": self._partition.model_dump(mode="json"),
            },
            flow_run_name=self._name,
            timeout=0,
            as_subflow=False,  # a subflow would be a task run as well
        )
        self._runs.append(run.id)
        self.has_begun, self._silent_since = False, None

    async def check(self) -> None:
        """Check the state of the last flow run; restart the partition once if it died."""
        if self.has_ended:
            return
        try:
            run = await self._client.read_flow_run(self._runs[-1])
            state = run.state
            if state is None:
                return
            if state.is_final():
                await self._handle_end(run, died=state.is_crashed())
            elif state.is_running() or state.is_cancelling():
                self.has_begun = True
                if await self._is_dead(run):
                    crashed = State(
                        type=StateType.CRASHED, message="The flow run has no heartbeat any more."
                    )
                    await self._client.set_flow_run_state(run.id, crashed, force=True)
                    await self._handle_end(run, died=not state.is_cancelling())
        except Exception as error:  # noqa: BLE001 - Prefect's API may come back
            get_run_logger().debug("%s could not be checked: %s", self._name, error)

    async def _is_dead(self, run: FlowRun) -> bool:
        now = asyncio.get_running_loop().time()
        if await is_alive(self._store, run.id.hex):
            self._silent_since = None
        elif self._silent_since is None:
            self._silent_since = now
        return (
            self._silent_since is not None and now - self._silent_since > HEARTBEAT_TIMEOUT_SECONDS
        )

    async def _handle_end(self, run: FlowRun, *, died: bool) -> None:
        # A partition with a share of a budget is not restarted: it may have spent its share.
        should_restart = died and len(self._runs) < _MAX_STARTS and not self._partition.has_budget
        get_run_logger().log(
            logging.WARNING if died else logging.INFO,
            "Partition %d of %d (%s) %s.%s",
            self._partition.number,
            self._partition.of,
            run.name,
            "died: it crashed, or its worker was killed" if died else f"ended as {run.state_name}",
            " It is started again." if should_restart else "",
        )
        if should_restart:
            await self.start()
        else:
            self.has_ended = True

    async def add_to(self, total: BatchSummary) -> float:
        """Add the counts of the last flow run to a total; return the dollars spent by all."""
        summaries = [await read_progress(self._store, run_id.hex) for run_id in self._runs]
        total.add(summaries[-1])
        return sum(summary.spent for summary in summaries)

    async def end(self) -> None:
        """Cancel a flow run that has not ended, and remove the progress records."""
        for run_id in self._runs:
            if not self.has_ended and run_id == self._runs[-1]:
                cancelling = State(type=StateType.CANCELLING)
                try:
                    await self._client.set_flow_run_state(run_id, cancelling)
                except Exception as error:  # noqa: BLE001 - the ledger has its rows
                    get_run_logger().warning("%s could not be cancelled: %s", self._name, error)
            await remove_progress(self._store, run_id.hex)
