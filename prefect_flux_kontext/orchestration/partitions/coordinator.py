"""The flow runs of a batch's partitions: started, looked at until they end, started once more."""

from __future__ import annotations

import asyncio
import logging
import math
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State, StateType
from prefect.context import FlowRunContext
from prefect.deployments import arun_deployment

from prefect_flux_kontext.batch.budget import ensure_sole_run
from prefect_flux_kontext.batch.index import PlannedAction
from prefect_flux_kontext.batch.summary import BatchSummary
from prefect_flux_kontext.ledger.heartbeat import is_alive, keep_heartbeat
from prefect_flux_kontext.ledger.store import open_ledger_store
from prefect_flux_kontext.models import utc_now
from prefect_flux_kontext.orchestration.approval import build_plan
from prefect_flux_kontext.orchestration.artifacts import progress_artifact
from prefect_flux_kontext.orchestration.batch_run import (
    PartitionTotals,
    create_spend_alarm,
    emit_started,
)
from prefect_flux_kontext.orchestration.partitions.flow import Partition
from prefect_flux_kontext.orchestration.partitions.leases import lease_slots
from prefect_flux_kontext.orchestration.partitions.progress import forget_progress, read_progress

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from uuid import UUID

    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import FlowRun

    from prefect_flux_kontext.batch.planning import Plan
    from prefect_flux_kontext.batch.policy import RowOptions
    from prefect_flux_kontext.batch.waves import Wave
    from prefect_flux_kontext.credentials import FluxKontextCredentials
    from prefect_flux_kontext.ledger.store import RecordStore
    from prefect_flux_kontext.manifest.reader import Manifest
    from prefect_flux_kontext.orchestration.partitions.leases import Lease
    from prefect_flux_kontext.orchestration.partitions.planner import PartitionPlan
    from prefect_flux_kontext.storage.filesystem import OutputFolder

LOOK_SECONDS = 5.0
SILENT_SECONDS = 30.0
"""Seconds without a progress record after which a running partition counts as dead."""

BEGINS_WITHIN = 300.0
"""Seconds after which an unstarted partition is withdrawn, if no other is running."""

_STARTS = 2


async def watch(running: list[PartitionRuns], total: BatchSummary) -> None:
    """Look at partitions until all have ended, or the others are withdrawn.

    Args:
        running: The partitions.
        total: What became of all their rows so far; it is kept up to date.
    """
    clock = asyncio.get_running_loop().time
    moved_at = clock()
    while not all(partition.ended for partition in running):
        await asyncio.sleep(LOOK_SECONDS)
        for partition in running:
            await partition.look()
        counted = BatchSummary(output=total.output)
        counted.spent = sum([await partition.add_to(counted) for partition in running])
        for name, value in counted:
            setattr(total, name, value)
        if any(partition.begun and not partition.ended for partition in running):
            moved_at = clock()
        elif clock() - moved_at > BEGINS_WITHIN:
            get_run_logger().warning(
                "No worker has begun the other partitions, so their rows are run here. Are there "
                "enough workers for the work pool, and may it run so many flow runs at once?"
            )
            return


async def end(running: list[PartitionRuns]) -> None:
    """End what still runs, and forget what the partitions have told."""
    for partition in running:
        await partition.end()


class PartitionRuns:
    """A partition and its flow runs, of which the last counts.

    Args:
        client: Prefect.
        store: The ledger, where the runs say that they live and how far they are.
        partition: The partition.
        wanted: How the batch is cut.
        name: The name of the batch's own flow run.

    Attributes:
        begun: Whether a worker has begun the last flow run.
        ended: Whether nothing more is to come of the partition.
    """

    def __init__(
        self,
        client: PrefectClient,
        store: RecordStore,
        partition: Partition,
        wanted: PartitionPlan,
        name: str,
    ) -> None:
        self.ended = self.begun = False
        self._client = client
        self._store = store
        self._partition = partition
        self._wanted = wanted
        self._name = f"{name}-partition-{partition.number}-of-{partition.of}"
        self._runs: list[UUID] = []
        self._silent_since: float | None = None

    async def start(self) -> None:
        """Start a flow run of the partition."""
        run: Any = await arun_deployment(
            self._wanted.deployment,
            parameters={
                **self._wanted.parameters,
                "partition": self._partition.model_dump(mode="json"),
            },
            flow_run_name=self._name,
            timeout=0,
            as_subflow=False,  # which would be a task run for each
        )
        self._runs.append(run.id)
        self.begun, self._silent_since = False, None

    async def look(self) -> None:
        """See how the partition is doing; one that died is started once more."""
        if self.ended:
            return
        try:
            run = await self._client.read_flow_run(self._runs[-1])
            state = run.state
            if state is None:
                return
            if state.is_final():
                await self._over(run, died=state.is_crashed())
            elif state.is_running() or state.is_cancelling():
                self.begun = True
                if await self._is_gone(run):
                    crashed = State(
                        type=StateType.CRASHED, message="It gives no sign of life any more."
                    )
                    await self._client.set_flow_run_state(run.id, crashed, force=True)
                    await self._over(run, died=not state.is_cancelling())
        except Exception as error:  # noqa: BLE001 - Prefect's API may come back
            get_run_logger().debug("%s was not looked at: %s", self._name, error)

    async def _is_gone(self, run: FlowRun) -> bool:
        now = asyncio.get_running_loop().time()
        if await is_alive(self._store, run.id.hex):
            self._silent_since = None
        elif self._silent_since is None:
            self._silent_since = now
        return self._silent_since is not None and now - self._silent_since > SILENT_SECONDS

    async def _over(self, run: FlowRun, *, died: bool) -> None:
        told = run.state_name if not died else "gone: its worker was killed, or it crashed"
        # A share of a budget may have been spent, so that it cannot be given twice.
        again = died and len(self._runs) < _STARTS and self._partition.budget_usd is None
        get_run_logger().log(
            logging.WARNING if died else logging.INFO,
            "Part %d of %d (%s) is %s%s.",
            self._partition.number,
            self._partition.of,
            run.name,
            told,
            ", and is started again" if again else "",
        )
        if again:
            await self.start()
        else:
            self.ended = True

    async def add_to(self, total: BatchSummary) -> float:
        """Add what the partition has come to, and return what all its flow runs have spent."""
        told = [await read_progress(self._store, run_id.hex) for run_id in self._runs]
        total.add(told[-1])
        return sum(each.spent for each in told)

    async def end(self) -> None:
        """Cancel what runs on, and forget what was told."""
        for run_id in self._runs:
            if not self.ended and run_id == self._runs[-1]:
                cancelling = State(type=StateType.CANCELLING)
                try:
                    await self._client.set_flow_run_state(run_id, cancelling)
                except Exception as error:  # noqa: BLE001 - its rows are on record
                    get_run_logger().warning("%s was not cancelled: %s", self._name, error)
            await forget_progress(self._store, run_id.hex)


@dataclass(frozen=True)
class RemainingWork:
    """What is left to the batch itself, when its partitions have ended.

    Attributes:
        account: The account, as it may be used.
        options: What a person has decided about its rows.
        earlier: What the partitions have come to; None where there were none.
        alert_above_usd: Dollars above which an event still is to say so.
        lease: The slots that are held for it.
    """

    account: FluxKontextCredentials
    options: RowOptions
    alert_above_usd: float | None
    earlier: PartitionTotals | None = None
    lease: Lease | None = None


@asynccontextmanager
async def run_partitions(
    wanted: PartitionPlan | None,
    plan: Plan,
    rows: Manifest,
    output: OutputFolder,
    account: FluxKontextCredentials,
    options: RowOptions,
    alert_above_usd: float | None,
) -> AsyncIterator[RemainingWork]:
    """Run a batch's partitions to their ends, and yield what is left to the batch itself.

    Args:
        wanted: How it is cut; None for a batch in one piece.
        plan: What is to be done.
        rows: The manifest.
        output: Its output.
        account: Who pays.
        options: What a person has decided about its rows.
        alert_above_usd: Dollars spent above which an event says so.

    Raises:
        ConfigurationError: There is a budget, and another run is paying into the output.
        LedgerError: The ledger cannot be read or written.
    """
    if wanted is None:
        yield RemainingWork(account, options, alert_above_usd)
        return
    began, since = asyncio.get_running_loop().time(), utc_now()
    emit_started(str(output), plan)
    total = BatchSummary(output=str(output))
    alarm = create_spend_alarm(total, lambda: total.spent, alert_above_usd)
    if plan.to_pay:
        await _run(_partitions(wanted, plan, options), wanted, output, options, total, plan, alarm)
    left = await build_plan(rows, output, account, options)
    total.spent = round(left.spent - plan.spent, 6)
    alarm()
    told = alert_above_usd is not None and total.spent > alert_above_usd
    rest = RemainingWork(
        wanted.share.of(account),
        replace(options, since=since),
        None if told else alert_above_usd,
        PartitionTotals(total.spent, asyncio.get_running_loop().time() - began),
    )
    if (
        left.to_pay
        or left.standings[PlannedAction.OUTSTANDING]
        or left.standings[PlannedAction.UNKNOWN]
    ):
        get_run_logger().info("What the partitions have left:\n%s", left)
        async with lease_slots(account, wanted.share.slots) as lease:
            yield replace(rest, lease=lease)
    else:
        yield rest


async def run_remaining(wave: Wave) -> BatchSummary:
    """Run a wave of what partitions have left; most have nothing left, and are no task run."""
    return await wave.run()


def _partitions(wanted: PartitionPlan, plan: Plan, options: RowOptions) -> list[Partition]:
    number = min(wanted.partitions, plan.to_pay)
    budget = None
    if options.budget_usd is not None:
        left = max(0.0, options.budget_usd - plan.spent)
        budget = math.floor(left / number * 1_000_000) / 1_000_000
    slots, requests = wanted.share
    return [
        Partition(
            number=each,
            of=number,
            slots=slots,
            requests_per_minute=requests,
            budget_usd=budget,
        )
        for each in range(1, number + 1)
    ]


async def _run(
    partitions: list[Partition],
    wanted: PartitionPlan,
    output: OutputFolder,
    options: RowOptions,
    total: BatchSummary,
    plan: Plan,
    alarm: Callable[[], None],
) -> None:
    store = open_ledger_store(output)
    context = FlowRunContext.get()
    name = context.flow_run.name if context is not None and context.flow_run else "batch"
    async with keep_heartbeat(store) as owner, get_client() as client:
        if options.budget_usd is not None:
            await ensure_sole_run(store, owner)
        running = [
            PartitionRuns(client, store, partition, wanted, name) for partition in partitions
        ]
        try:
            for partition in running:
                await partition.start()
            async with progress_artifact(total, plan.rows, alarm):
                await watch(running, total)
        finally:
            await asyncio.shield(end(running))
