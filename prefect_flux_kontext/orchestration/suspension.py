"""Suspending a flow run once its rows are submitted, and resuming it once results are ready.

A suspended flow run holds no process. A resumed one starts from the top in a new process; the
ledger knows which rows are paid for, so the run pays for none of them again.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import fsspec
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

_SUSPENSION_KEY = "submitted"
"""Prefect suspends a flow run once for each key, and records the keys in the flow run."""

_PAGE_SIZE = 200
"""The most flow runs that Prefect's API returns in one response by default."""


def check_can_suspend() -> None:
    """Check that the current flow run can be suspended, before anything is paid.

    Raises:
        ConfigurationError: It cannot; the message says why.
    """
    run = _get_current_run()
    reason = None
    if run is None or run.deployment_id is None:
        reason = "this flow run has no deployment, without which Prefect cannot start it again"
    elif run.parent_task_run_id is not None:
        reason = "this flow run is a subflow, which Prefect cannot suspend"
    if reason:
        raise ConfigurationError(
            f'wait="suspend" is not possible: {reason}. Nothing was submitted. Use wait="poll", '
            'or wait="collect" and a deployment of collect_batch.'
        )


def was_resumed() -> bool:
    """Whether the current flow run was suspended after its rows were submitted."""
    run = _get_current_run()
    return run is not None and _SUSPENSION_KEY in (run.empirical_policy.pause_keys or ())


async def suspend() -> None:
    """Suspend the current flow run and end its process. Once resumed, it starts from the top."""
    await asuspend_flow_run(key=_SUSPENSION_KEY)


async def resume_suspended(output: OutputFolder) -> list[UUID]:
    """Resume the flow runs that are suspended for an output, and return their ids.

    Args:
        output: The output of the batch.
    """
    resumed = []
    for run in await _read_suspended():
        if await _has_output(run, str(output)):
            with contextlib.suppress(NotPausedError):  # another process has resumed it
                await aresume_flow_run(run.id)
                resumed.append(run.id)
    return resumed


async def log_outstanding(flow: Any, flow_run: FlowRun, state: State[Any]) -> None:  # noqa: ARG001
    """Log what is paid for and not stored according to the ledger, after a cancellation."""
    parameters = flow_run.parameters
    output = await open_output(parameters["output"], parameters.get("storage_options"))
    status = await read_ledger_status(open_ledger_store(output))
    get_logger("prefect_flux_kontext").warning(
        "%s was cancelled. Outstanding rows, paid for and not stored: %d. Unknown rows, which may "
        "be paid for: %d. Collect them: flux-kontext collect %s",
        flow_run.name,
        len(status.outstanding),
        len(status.unknown),
        output,
    )


async def _read_suspended() -> list[FlowRun]:
    runs: list[FlowRun] = []
    suspended = FlowRunFilter(
        state=FlowRunFilterState(name=FlowRunFilterStateName(any_=["Suspended"]))
    )
    async with get_client() as client:
        while True:
            page = await client.read_flow_runs(
                flow_run_filter=suspended, limit=_PAGE_SIZE, offset=len(runs)
            )
            runs += page
            if len(page) < _PAGE_SIZE:
                return runs


async def _has_output(run: FlowRun, output: str) -> bool:
    """Whether a flow run has this output.

    URLs are compared, not opened: anything may be in a suspended flow run, and some filesystems
    connect when they are opened.
    """
    value = run.parameters.get("output")
    try:
        if isinstance(value, dict) or str(value).startswith("block:"):
            value = await open_output(value)
        return _parse_location(str(value)) == _parse_location(output)
    except (TypeError, ValueError, ImportError, ConfigurationError):
        return False  # not one of our flows


def _parse_location(url: str) -> tuple[type, str]:
    """Return the class of a URL's filesystem, and the path on it."""
    kind = fsspec.get_filesystem_class(fsspec.core.split_protocol(url)[0] or "file")
    return kind, str(kind._strip_protocol(url))  # noqa: SLF001 - fsspec has no public name for it


def _get_current_run() -> FlowRun | None:
    context = FlowRunContext.get()
    return context.flow_run if context else None
