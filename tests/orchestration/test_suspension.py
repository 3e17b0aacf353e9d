"""Resuming the flow runs that are suspended for an output, and no others."""

import asyncio
import os
import subprocess
import sys
import uuid

import pytest
from prefect import get_client
from prefect.client.schemas.objects import FlowRunPolicy
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Running, Suspended

from prefect_flux_kontext import (
    FluxKontextCredentials,
    GenerationRequest,
    GenerationTask,
    submit_generation,
    suspend_until_done,
    wait_for_generation,
)
from prefect_flux_kontext.cli import main
from prefect_flux_kontext.errors import ConfigurationError
from prefect_flux_kontext.flows import collect_batch, style_transfer_batch
from prefect_flux_kontext.ledger.store import open_ledger_store
from prefect_flux_kontext.orchestration.suspension import resume_suspended
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from prefect_flux_kontext.storage.filesystem import OutputFolder
from tests.orchestration.conftest import KEY, QUICK
from tests.orchestration.deployed import read_state_names, wait_for_state

pytestmark = pytest.mark.anyio


async def create_suspended(output, *keys):
    """Create a suspended run of a deployment, as Prefect's engine leaves it; return its id.

    It was suspended once for each key, and waits for the last.
    """
    keys = keys or ("submitted-0",)
    async with get_client() as client:
        flow_id = await client.create_flow(style_transfer_batch)
        deployment_id = await client.create_deployment(flow_id, f"of-{uuid.uuid4()}")
        run = await client.create_flow_run_from_deployment(
            deployment_id, parameters={"manifest": "m.csv", "output": str(output)}
        )
        for state in (Running(), Suspended(pause_key=keys[-1])):
            await client.set_flow_run_state(run.id, state, force=True)
        policy = FlowRunPolicy(pause_keys=set(keys))
        await client.update_flow_run(run.id, empirical_policy=policy)
    store = open_ledger_store(OutputFolder(str(output)))
    await store.replace(f"waiting/{run.id}.json", b"{}")
    return run.id


async def read_state(run_id):
    async with get_client() as client:
        return (await client.read_flow_run(run_id)).state.name


async def test_only_runs_of_the_output_are_resumed(tmp_path):
    mine, other = await create_suspended(tmp_path), await create_suspended(tmp_path / "other")
    assert await resume_suspended(f"file://{tmp_path}") == [mine]
    assert await read_state(mine) == "Resuming"
    assert await read_state(other) == "Suspended"
    assert await resume_suspended(str(tmp_path)) == []


async def test_planted_records_resume_nothing(tmp_path):
    foreign = await create_suspended(tmp_path, "approval")
    asks_again = await create_suspended(tmp_path, "submitted-0", "another-approval")
    store = open_ledger_store(OutputFolder(str(tmp_path)))
    for name in ("x.json", f"{uuid.uuid4()}.json", "..json"):
        await store.replace(f"waiting/{name}", b"{}")
    assert await resume_suspended(str(tmp_path)) == []
    assert await read_state(foreign) == await read_state(asks_again) == "Suspended"


async def test_complete_collection_resumes_runs(account, tmp_path):
    how = {"credentials": account, "cadence": QUICK}
    rows = [{"id": "a", "prompt": "a lighthouse"}]
    await style_transfer_batch(rows, str(tmp_path), wait="collect", **how)
    waiting = await create_suspended(tmp_path)
    hasty = {"initial_delay": 0.0, "interval": 0.01, "timeout": 1e-9}
    summary = await collect_batch(str(tmp_path), credentials=account, cadence=hasty)
    assert summary.outstanding == 1
    assert await read_state(waiting) == "Suspended"
    assert (await collect_batch(str(tmp_path), **how)).stored == 1
    assert await read_state(waiting) == "Resuming"


def test_collect_command_resumes_runs_on_request(account_in_environment, tmp_path, capsys):
    waiting = asyncio.run(create_suspended(tmp_path))
    assert main(["collect", str(tmp_path)]) == 0
    assert asyncio.run(read_state(waiting)) == "Suspended"
    assert main(["collect", str(tmp_path), "--resume"]) == 0
    assert f"Resumed flow run {waiting}" in capsys.readouterr().out
    assert asyncio.run(read_state(waiting)) == "Resuming"


def test_collect_command_with_resume_needs_an_api_url(account_in_environment, tmp_path, capsys):
    with temporary_settings({PREFECT_API_URL: None}):
        assert main(["collect", str(tmp_path), "--resume"]) == 2
    assert "PREFECT_API_URL" in capsys.readouterr().err


OWN_FLOW = """
from prefect import flow
from prefect_flux_kontext import (
    GenerationRequest, persist_images, submit_generation, suspend_until_done, wait_for_generation
)

@flow
async def own(output: str):
    requests = [GenerationRequest(prompt=f"a ship {number}") for number in range(5)]
    tasks = [await submit_generation(r, ledger=output, defer="suspend") for r in requests]
    await suspend_until_done(tasks)
    for task in tasks:
        await persist_images(await wait_for_generation(task), output)

if __name__ == "__main__":
    own.serve(name="suspends")
"""


@pytest.fixture
def own_flow(tmp_path, prefect_api):
    """The folder of a flow that is served, and the slow sandbox that it uses."""
    script = tmp_path / "own_flow.py"
    script.write_text(OWN_FLOW)
    with running_sandbox(SandboxSettings(mean=4, spread=0, long_edge=16, api_key=KEY)) as sandbox:
        environment = {
            **os.environ,
            **prefect_api.environment,
            "FLUX_KONTEXT_API_KEY": KEY,
            "FLUX_KONTEXT_BASE_URL": sandbox.url,
            "FLUX_KONTEXT_POLL_INITIAL_DELAY": "0",
            "FLUX_KONTEXT_POLL_INTERVAL": "0.1",
        }
        with subprocess.Popen(
            [sys.executable, str(script)], env=environment, cwd=tmp_path
        ) as serving:
            try:
                yield tmp_path, sandbox
            finally:
                serving.terminate()


async def test_own_flow_suspends_until_its_tasks_are_done(own_flow):
    folder, sandbox = own_flow
    output = folder / "ships"
    account = FluxKontextCredentials(api_key=KEY, base_url=sandbox.url)
    async with get_client() as client:
        for _ in range(600):
            try:
                await client.read_deployment_by_name("own/suspends")
                break
            except ObjectNotFound:
                await asyncio.sleep(0.1)
    run = await run_deployment("own/suspends", parameters={"output": str(output)}, timeout=0)
    await wait_for_state(run.id, "Suspended")
    assert sandbox.service.bill()["accepted"] == 5
    assert not list(output.glob("*.jpg"))
    for _ in range(600):  # the process of the suspended run may need a moment to end
        summary = await collect_batch(str(output), credentials=account, cadence=QUICK)
        if summary.rows:
            break
        await asyncio.sleep(0.1)
    assert summary.stored == 5
    await wait_for_state(run.id, "Completed")
    assert (await read_state_names(run.id)).count("Running") == 2
    assert sandbox.service.bill()["accepted"] == 5
    assert len(list(output.glob("*.jpg"))) == 5
    assert list((output / "_ledger" / "waiting").iterdir()) == []


async def test_task_without_a_ledger_cannot_be_suspended_for(account):
    with pytest.raises(ConfigurationError, match="has no ledger"):
        await suspend_until_done([GenerationTask(task_id="task_1")], account)


async def test_flow_that_cannot_be_suspended_pays_nothing(account, sandbox, tmp_path):
    request = GenerationRequest(prompt="a ship")
    with pytest.raises(ConfigurationError, match="no deployment"):
        await submit_generation(request, account, str(tmp_path), defer="suspend")
    assert sandbox.service.bill()["accepted"] == 0


async def test_tasks_that_have_ended_suspend_nothing(account, tmp_path):
    submitted = await submit_generation(GenerationRequest(prompt="a ship"), account, str(tmp_path))
    await wait_for_generation(submitted, account, QUICK)
    await suspend_until_done([submitted], account)
