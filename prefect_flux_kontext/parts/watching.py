"""The flow runs of a batch's parts: started, looked at until they end, started once more."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from prefect import get_run_logger
from prefect.client.schemas.objects import State, StateType
from prefect.deployments import arun_deployment

from prefect_flux_kontext.batch.summary import BatchSummary
from prefect_flux_kontext.ledger.owners import is_alive
from prefect_flux_kontext.parts.progress import forget_progress, progress_of

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import FlowRun

    from prefect_flux_kontext.ledger.store import RecordStore
    from prefect_flux_kontext.parts.cutting import Cut
    from prefect_flux_kontext.parts.part import Part

LOOK_SECONDS = 5.0
SILENT_SECONDS = 30.0
"""For which a part may run without a sign of life: it is about to give one, or has just ended."""

BEGINS_WITHIN = 300.0
"""Seconds after which a part that no worker has begun is withdrawn, if no other is running."""

_STARTS = 2


async def watch(running: list[PartRuns], total: BatchSummary) -> None:
    """Look at parts until all have ended, or the others are withdrawn.

    Args:
        running: The parts.
        total: What became of all their rows so far; it is kept up to date.
    """
    clock = asyncio.get_running_loop().time
    moved_at = clock()
    while not all(part.ended for part in running):
        await asyncio.sleep(LOOK_SECONDS)
        for part in running:
            await part.look()
        counted = BatchSummary(output=total.output)
        counted.spent = sum([await part.add_to(counted) for part in running])
        for name, value in counted:
            setattr(total, name, value)
        if any(part.begun and not part.ended for part in running):
            moved_at = clock()
        elif clock() - moved_at > BEGINS_WITHIN:
            get_run_logger().warning(
                "No worker has begun the other parts, so their rows are run here. Are there "
                "enough workers for the work pool, and may it run so many flow runs at once?"
            )
            return


async def end(running: list[PartRuns]) -> None:
    """End what still runs, and forget what the parts have told."""
    for part in running:
        await part.end()


class PartRuns:
    """A part and its flow runs, of which the last counts.

    Args:
        client: Prefect.
        store: The ledger, where the runs say that they live and how far they are.
        part: The part.
        wanted: How the batch is cut.
        name: The name of the batch's own flow run.

    Attributes:
        begun: Whether a worker has begun the last flow run.
        ended: Whether nothing more is to come of the part.
    """

    def __init__(
        self, client: PrefectClient, store: RecordStore, part: Part, wanted: Cut, name: str
    ) -> None:
        self.ended = self.begun = False
        self._client = client
        self._store = store
        self._part = part
        self._wanted = wanted
        self._name = f"{name}-part-{part.number}-of-{part.of}"
        self._runs: list[UUID] = []
        self._silent_since: float | None = None

    async def start(self) -> None:
        """Start a flow run of the part."""
        run: Any = await arun_deployment(
            self._wanted.deployment,
            parameters={**self._wanted.parameters, "part": self._part.model_dump(mode="json")},
            flow_run_name=self._name,
            timeout=0,
            as_subflow=False,  # which would be a task run for each
        )
        self._runs.append(run.id)
        self.begun, self._silent_since = False, None

    async def look(self) -> None:
        """See how the part is doing; one that died is started once more."""
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
        again = died and len(self._runs) < _STARTS and self._part.budget_usd is None
        get_run_logger().log(
            logging.WARNING if died else logging.INFO,
            "Part %d of %d (%s) is %s%s.",
            self._part.number,
            self._part.of,
            run.name,
            told,
            ", and is started again" if again else "",
        )
        if again:
            await self.start()
        else:
            self.ended = True

    async def add_to(self, total: BatchSummary) -> float:
        """Add what the part has come to, and return what all its flow runs have spent."""
        told = [await progress_of(self._store, run_id.hex) for run_id in self._runs]
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
