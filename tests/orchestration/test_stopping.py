"""A flow that is stopped still records every submit that is under way."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from prefect.deployments import run_deployment
from prefect.flows import EntrypointType

from prefect_flux_kontext.batch.status import read_ledger_status
from prefect_flux_kontext.flows import style_transfer_batch
from prefect_flux_kontext.ledger.store import open_ledger_store
from prefect_flux_kontext.sandbox.faults.plan import FaultPlan
from prefect_flux_kontext.storage.filesystem import OutputFolder
from tests.orchestration.conftest import KEY, QUICK
from tests.orchestration.deployed import read_state_names

ROWS = [{"id": f"row-{n}", "prompt": f"a lighthouse {n}"} for n in range(60)]

SCRIPT = """
import asyncio
from prefect_flux_kontext.flows import style_transfer_batch

rows = [{"id": f"row-{n}", "prompt": f"a lighthouse {n}"} for n in range(60)]
asyncio.run(style_transfer_batch(rows, OUTPUT))
"""

SYNC_SCRIPT = """
from prefect import flow
from prefect_flux_kontext import GenerationRequest, submit_generation

@flow
def nightly():
    submit_generation(GenerationRequest(prompt="a lighthouse"), ledger=OUTPUT)

nightly()
"""


def read_status(output):
    return asyncio.run(read_ledger_status(open_ledger_store(OutputFolder(str(output)))))


def wait_for_submits(sandbox, number):
    end = time.monotonic() + 240  # three programs start, which takes long on a busy machine
    while sandbox.active_faults.numbers["submit"] < number:
        assert time.monotonic() < end
        threading.Event().wait(0.01)


def assert_all_recorded(sandbox, output, at_least=8):
    """Assert that every accepted task is on record, and nothing else."""
    status = read_status(output)
    assert status.unknown == []
    accepted = sandbox.service.bill()["accepted"]
    assert accepted >= at_least
    assert status.spent == pytest.approx(0.03 * accepted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("script", "submits"), [(SCRIPT, 8), (SYNC_SCRIPT, 1)])
def test_signal_to_a_flow_script_discards_no_reply(
    sandbox, tmp_path, prefect_api, script, submits, number
):
    sandbox.active_faults.change(FaultPlan(faults=["submit:slow"], slow=1.5))
    environment = {
        **os.environ,
        **prefect_api.environment,
        "FLUX_KONTEXT_API_KEY": KEY,
        "FLUX_KONTEXT_BASE_URL": sandbox.url,
    }
    script = script.replace("OUTPUT", repr(str(tmp_path)))
    with subprocess.Popen([sys.executable, "-c", script], env=environment) as process:
        wait_for_submits(sandbox, submits)
        process.send_signal(number)
        process.wait(60)
    assert process.returncode != 0
    assert_all_recorded(sandbox, tmp_path, at_least=submits)


def test_time_limit_of_a_flow_discards_no_reply(sandbox, account, tmp_path):
    sandbox.active_faults.change(FaultPlan(faults=["submit:slow"], slow=2.0))
    limited = style_transfer_batch.with_options(timeout_seconds=3)

    async def run():
        return await limited(
            ROWS, str(tmp_path), credentials=account, cadence=QUICK, return_state=True
        )

    state = asyncio.run(run())
    assert state.name == "TimedOut"
    assert_all_recorded(sandbox, tmp_path)


async def create_run(output):
    """Create a flow run of a deployment that no worker runs, and return its id."""
    deployment = await style_transfer_batch.to_deployment(
        f"stopped-{output.name}", entrypoint_type=EntrypointType.MODULE_PATH
    )
    parameters = {"manifest": ROWS, "output": str(output)}
    return (
        await run_deployment(
            await deployment.apply(), parameters=parameters, timeout=0, as_subflow=False
        )
    ).id


@pytest.mark.timeout(900)
@pytest.mark.parametrize("behavior", ["reschedule", "relinquish"])
def test_stopped_container_discards_no_reply(sandbox, tmp_path, prefect_api, behavior):
    """Kubernetes evicts the pod of a flow run, as `prefect flow-run execute` sees it."""
    sandbox.active_faults.change(FaultPlan(faults=["submit:slow"], slow=1.5))
    run_id = asyncio.run(create_run(tmp_path))
    environment = {
        **os.environ,
        **prefect_api.environment,
        "FLUX_KONTEXT_API_KEY": KEY,
        "FLUX_KONTEXT_BASE_URL": sandbox.url,
        "PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR": behavior,
    }
    command = [sys.executable, "-m", "prefect", "flow-run", "execute", str(run_id)]
    with subprocess.Popen(command, env=environment) as process:
        try:
            wait_for_submits(sandbox, 8)
            process.send_signal(signal.SIGTERM)
            process.wait(60)
        finally:
            process.kill()
    assert_all_recorded(sandbox, tmp_path)
    if behavior == "reschedule":
        states = asyncio.run(read_state_names(run_id))
        assert states[-1] == "AwaitingRetry"
