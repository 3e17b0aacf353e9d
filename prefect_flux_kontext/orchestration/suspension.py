"""Waiting without a process: a flow run is suspended once its rows are submitted, and resumed.

A resumed run starts at its top again, in a process of its own; the ledger makes that free.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateName,
)
from prefect.context import FlowRunContext
from prefect.exceptions import NotPausedError
from prefect.flow_runs import aresume_flow_run, asuspend_flow_run
from prefect.logging import get_logger

from prefect_flux_kontext.batch.collection import read_ledger_status
from prefect_flux_kontext.errors import ConfigurationError
from prefect_flux_kontext.ledger.store import open_ledger_store
from prefect_flux_kontext.orchestration.parameters import open_output

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.schemas.objects import FlowRun, State

    from prefect_flux_kontext.storage.filesystem import OutputFolder

_KEY = "submitted"
_PAGE = 200


def check_can_suspend() -> None:
    """Find out before anything is paid whether the present flow run can be suspended.

    Raises:
        ConfigurationError: It cannot; the message says why.
    """
    run = _present_run()
    why = None
    if run is None or run.deployment_id is None:
        why = "this flow run has no deployment, and only a deployment's run can be started again"
    elif run.parent_task_run_id is not None:
        why = "this flow run is a subflow, and Prefect suspends no subflows"
    if why:
        raise ConfigurationError(
            f'wait="suspend" cannot work here: {why}. Nothing was submitted. Use wait="poll", or '
            'wait="collect" and a deployment of collect_batch.'
        )


def was_resumed() -> bool:
    """Whether the present flow run was suspended once its rows were submitted."""
    run = _present_run()
    return run is not None and _KEY in (run.empirical_policy.pause_keys or ())


async def suspend() -> None:
    """End this process; the flow run goes on, from its top, when somebody resumes it."""
    await asuspend_flow_run(key=_KEY)


async def resume_suspended(output: OutputFolder) -> list[UUID]:
    """Resume the flow runs that wait for an output's results, and return their ids.

    Args:
        output: The batch's output.
    """
    resumed = []
    for run in await _suspended():
        if await _output_of(run) == str(output):
            with contextlib.suppress(NotPausedError):  # somebody else was quicker
                await aresume_flow_run(run.id)
                resumed.append(run.id)
    return resumed


async def _suspended() -> list[FlowRun]:
    runs: list[FlowRun] = []
    wanted = FlowRunFilter(
        state=FlowRunFilterState(name=FlowRunFilterStateName(any_=["Suspended"]))
    )
    async with get_client() as client:
        while True:
            page = await client.read_flow_runs(
                flow_run_filter=wanted, limit=_PAGE, offset=len(runs)
            )
            runs += page
            if len(page) < _PAGE:
                return runs


async def _output_of(run: FlowRun) -> str | None:
    given = run.parameters
    try:
        return str(await open_output(given["output"], given.get("storage_options")))
    except (KeyError, TypeError, ConfigurationError):
        return None  # a flow of somebody else's


def _present_run() -> FlowRun | None:
    context = FlowRunContext.get()
    return context.flow_run if context else None


async def log_outstanding(flow: Any, flow_run: FlowRun, state: State[Any]) -> None:  # noqa: ARG001
    """After a cancellation, log what the ledger says is paid for and not stored."""
    given = flow_run.parameters
    output = await open_output(given["output"], given.get("storage_options"))
    status = await read_ledger_status(open_ledger_store(output))
    get_logger("prefect_flux_kontext").warning(
        "%s was cancelled. Paid for and not stored: %d rows; maybe paid for: %d. To collect them: "
        "flux-kontext collect %s",
        flow_run.name,
        len(status.outstanding),
        len(status.unknown),
        output,
    )
