"""Resuming the flow runs that are suspended for an output, and no others."""

import asyncio
import uuid

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from prefect import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Running, Suspended

from prefect_flux_kontext.cli import main
from prefect_flux_kontext.flows import collect_batch, style_transfer_batch
from prefect_flux_kontext.orchestration.suspension import resume_suspended
from prefect_flux_kontext.storage.filesystem import OutputFolder
from tests.orchestration.conftest import QUICK

pytestmark = pytest.mark.anyio


async def create_suspended(output):
    """Create a suspended run of a deployment, as Prefect's engine leaves it; return its id."""
    async with get_client() as client:
        flow_id = await client.create_flow(style_transfer_batch)
        deployment_id = await client.create_deployment(flow_id, f"of-{uuid.uuid4()}")
        run = await client.create_flow_run_from_deployment(
            deployment_id, parameters={"manifest": "m.csv", "output": str(output)}
        )
        for state in (Running(), Suspended()):
            await client.set_flow_run_state(run.id, state, force=True)
    return run.id


async def read_state(run_id):
    async with get_client() as client:
        return (await client.read_flow_run(run_id)).state.name


async def test_only_runs_of_the_output_are_resumed(tmp_path):
    mine, other = await create_suspended(tmp_path), await create_suspended(tmp_path / "other")
    foreign = await create_suspended("no-such-filesystem://x")
    assert await resume_suspended(f"file://{tmp_path}") == [mine]
    assert await read_state(mine) == "Resuming"
    assert {await read_state(other), await read_state(foreign)} == {"Suspended"}
    assert await resume_suspended(str(tmp_path)) == []


async def test_other_runs_outputs_are_not_opened(tmp_path, monkeypatch):
    """A suspended run may name any filesystem; some connect when they are opened."""

    class Connecting(MemoryFileSystem):
        protocol = "connecting"

        def __init__(self, *_args, **_options):
            pytest.fail("the filesystem was opened")

    monkeypatch.setitem(_registry, "connecting", Connecting)
    await create_suspended("connecting://host/x")
    mine = await create_suspended(tmp_path)
    assert await resume_suspended(OutputFolder(str(tmp_path))) == [mine]


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
