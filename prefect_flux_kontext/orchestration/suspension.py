"""Suspending a flow run once its rows are submitted, and resuming it once results are ready.

A suspended flow run holds no process. A resumed one starts from the top in a new process; the
ledger knows which rows are paid for, so the run pays for none of them again.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.exceptions import NotPausedError, ObjectNotFound
from prefect.flow_runs import aresume_flow_run, asuspend_flow_run
from prefect.logging import get_logger

from prefect_flux_kontext.batch.single import read_entry
from prefect_flux_kontext.batch.status import read_ledger_status
from prefect_flux_kontext.credentials import FluxKontextCredentials, resolve_credentials
from prefect_flux_kontext.errors import ConfigurationError
from prefect_flux_kontext.ledger.records import RECORD_VERSION
from prefect_flux_kontext.ledger.store import open_ledger_store
from prefect_flux_kontext.orchestration.parameters import Output, StorageOptions, open_output

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun, State

    from prefect_flux_kontext.models import GenerationTask
    from prefect_flux_kontext.storage.filesystem import OutputFolder

_BATCH_KEY = "submitted"
_TASKS_KEY = "tasks"
"""Prefect suspends a flow run once for each key, and records the keys in the flow run."""

_WAITING_FOLDER = "waiting"
"""The folder in a ledger whose records name the flow runs that are suspended for it."""

_CONCURRENT_REQUESTS = 16


def check_can_suspend(option: str = 'wait="suspend"') -> None:
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
            f"{option} is not possible: {reason}. Nothing was submitted. Wait for the results "
            "instead, or collect them later with a deployment of collect_batch."
        )


def was_resumed() -> bool:
    """Whether the current flow run was suspended after its rows were submitted."""
    return any(key.startswith(_BATCH_KEY) for key in _read_pause_keys())


async def suspend_batch(output: OutputFolder) -> None:
    """Suspend the current flow run and end its process. Once resumed, it starts from the top."""
    await _suspend(_BATCH_KEY, [output])


async def suspend_until_done(
    tasks: Sequence[GenerationTask],
    credentials: FluxKontextCredentials | str | None = None,
    storage_options: StorageOptions = None,
) -> None:
    """Suspend the current flow run until the tasks have ended; call it in the flow, not in a task.

    A suspended flow run holds no process and no worker slot. `collect_batch`, `flux-kontext
    collect --resume` or the Resume button resumes it. It then starts from its top: its submits
    return the same tasks, at no cost, and this function returns at once.

    Example:
        ```python
        tasks = [await submit_generation(request, ledger=output) for request in requests]
        await suspend_until_done(tasks)
        results = [await wait_for_generation(task) for task in tasks]
        ```

    Args:
        tasks: Tasks that were submitted with a ledger.
        credentials: A credentials Block, or the name of a saved one. Default: the environment.
        storage_options: Options of the ledgers' filesystem. Default: the environment.

    Raises:
        ConfigurationError: A task has no ledger, or this flow run cannot be suspended.
        LedgerError: The ledger cannot be read or written.
    """
    outputs: dict[str, OutputFolder] = {}
    for task in tasks:
        if task.ledger is None or task.key is None:
            raise ConfigurationError(
                f"Task {task.task_id} has no ledger, so the flow would pay again once it is "
                "resumed. Submit it with ledger=…"
            )
        if task.ledger not in outputs:
            outputs[task.ledger] = await open_output(task.ledger, storage_options)
    account = await resolve_credentials(credentials)
    gate = asyncio.Semaphore(_CONCURRENT_REQUESTS)

    async def has_ended(task: GenerationTask) -> bool:
        async with gate:
            if (await read_entry(outputs[str(task.ledger)], str(task.key))).ended is not None:
                return True
            return (await client.status(task.task_id)).has_ended

    async with account.get_client() as client:
        ended = await asyncio.gather(*map(has_ended, tasks))
    if not all(ended):
        check_can_suspend("suspend_until_done")
        await _suspend(_TASKS_KEY, outputs.values())


async def resume_suspended(output: Output, storage_options: StorageOptions = None) -> list[UUID]:
    """Resume the flow runs that are suspended for an output, and return their ids.

    Args:
        output: The output of the batch, or the ledger of the tasks.
        storage_options: Options of its filesystem. Default: the environment.
    """
    store = open_ledger_store(await open_output(output, storage_options))
    resumed = []
    async with get_client() as client:
        for name in await store.list_names(_WAITING_FOLDER):
            try:
                run = await client.read_flow_run(UUID(name.removesuffix(".json")))
                if run.state is not None and _is_suspended_here(run.state):
                    await aresume_flow_run(run.id)
                    resumed.append(run.id)
                elif run.state is not None and not run.state.is_final():
                    continue  # about to be suspended, or running again
            except (NotPausedError, ObjectNotFound, ValueError):
                pass  # another process has resumed it, or there is no such flow run
            await store.remove(f"{_WAITING_FOLDER}/{name}")
    return resumed


async def _suspend(key: str, outputs: Iterable[OutputFolder]) -> None:
    run = _get_current_run()
    if run is not None:
        for output in outputs:
            record = json.dumps({"version": RECORD_VERSION, "flow_run": run.name}).encode()
            name = f"{_WAITING_FOLDER}/{run.id}.json"
            await open_ledger_store(output).replace(name, record)
    await asuspend_flow_run(key=f"{key}-{len(_read_pause_keys())}")


async def log_outstanding(flow: Any, flow_run: FlowRun, state: State[Any]) -> None:  # noqa: ARG001
    """Log what is paid for and not stored according to the ledger, after a cancellation."""
    parameters = flow_run.parameters
    options = {**parameters, **(parameters.get("advanced") or {})}
    output = await open_output(parameters["output"], options.get("storage_options"))
    status = await read_ledger_status(open_ledger_store(output))
    get_logger("prefect_flux_kontext").warning(
        "%s was cancelled. Outstanding rows, paid for and not stored: %d. Unknown rows, which may "
        "be paid for: %d. Collect them: flux-kontext collect %s",
        flow_run.name,
        len(status.outstanding),
        len(status.unknown),
        output,
    )


def _is_suspended_here(state: State[Any]) -> bool:
    # Anyone who can write to the output can name any flow run in it, also one that waits for an
    # approval.
    key = state.state_details.pause_key or ""
    return state.is_paused() and key.startswith((_BATCH_KEY, _TASKS_KEY))


def _read_pause_keys() -> set[str]:
    run = _get_current_run()
    return set(run.empirical_policy.pause_keys or ()) if run is not None else set()


def _get_current_run() -> FlowRun | None:
    context = FlowRunContext.get()
    return context.flow_run if context else None
