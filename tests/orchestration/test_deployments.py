"""prefect.yaml, deployed to a real server and run by a real worker in an empty folder."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import anyio
import pytest
from prefect import get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowFilter,
    FlowFilterName,
)
from prefect.deployments import run_deployment

from prefect_flux_kontext import PollingCadence
from prefect_flux_kontext.flows import style_transfer_batch
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from tests.orchestration.conftest import KEY
from tests.orchestration.deployed import read_state_names, running_worker, wait_for_state

ROOT = Path(__file__).parents[2]
POOL = "flux-kontext"
NAMES = {
    "style-transfer-batch/on-demand",
    "style-transfer/style-transfer",
    "style-transfer-batch/nightly-prefix",
    "style-transfer-batch/manifest-lands",
    "collect-batch/collect-hourly",
    "retry-failed/retry-failed-on-demand",
}

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(400)]


class Deployed:
    """A copy of the deployments, with a worker that runs them."""

    def __init__(self, folder, environment, sandbox):
        self.folder = folder
        self.environment = environment
        self.sandbox = sandbox
        self.output = folder / "restyled"

    def run(self, *command):
        """Run a command in the folder of the deployments, and return its output."""
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def write_manifest(self, name, *prompts):
        path = self.folder / name
        lines = [f"row-{number},{prompt}" for number, prompt in enumerate(prompts)]
        path.write_text("\n".join(["id,prompt", *lines]))
        return str(path)

    def count_paid(self):
        return self.sandbox.service.bill()["accepted"]


@pytest.fixture(scope="module")
def place(prefect_api, tmp_path_factory):
    folder = tmp_path_factory.mktemp("deployed")
    shutil.copytree(ROOT / "flows", folder / "flows")
    text = (ROOT / "prefect.yaml").read_text()
    # Only the delay of a minute is shortened.
    assert "schedule_after: 60" in text
    (folder / "prefect.yaml").write_text(text.replace("schedule_after: 60", "schedule_after: 1"))
    with running_sandbox(SandboxSettings(mean=0.5, long_edge=64, api_key=KEY)) as sandbox:
        environment = prefect_api.environment | {
            "FLUX_KONTEXT_API_KEY": KEY,
            "FLUX_KONTEXT_BASE_URL": sandbox.url,
            "FLUX_KONTEXT_POLL_INITIAL_DELAY": "0",
            "FLUX_KONTEXT_POLL_INTERVAL": "0.1",
            "INCOMING": str(folder / "incoming.csv"),
            "RESTYLED": str(folder / "restyled"),
            "PYTHONPATH": str(ROOT),
            "PREFECT_WORKER_QUERY_SECONDS": "1",
        }
        place = Deployed(folder, environment, sandbox)
        place.run("prefect", "work-pool", "create", POOL, "--type", "process")
        place.printed = place.run(
            "prefect_flux_kontext",
            *("deploy", environment["INCOMING"], "--output", environment["RESTYLED"]),
        )
        place.run("prefect", "deploy", "--all")
        with running_worker(POOL, tmp_path_factory.mktemp("empty"), environment):
            yield place


async def wait_for_run(flow, output):
    """Wait for a run of a flow with an output, and return it."""
    async with get_client() as client:
        for _ in range(1_200):
            runs = await client.read_flow_runs(
                flow_filter=FlowFilter(name=FlowFilterName(any_=[flow])), limit=200
            )
            for run in runs:
                if str(run.parameters.get("output")).endswith(str(output)):
                    return run
            await anyio.sleep(0.1)
    raise AssertionError(f"no run of {flow} into {output}")


async def has_ended(pid):
    for _ in range(600):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        await anyio.sleep(0.1)
    return False


async def test_deployments_need_no_checkout(place):
    assert place.printed.count("$ prefect deployment run") == 7
    async with get_client() as client:
        deployments = [await client.read_deployment_by_name(name) for name in NAMES]
    for deployment in deployments:
        assert deployment.entrypoint.startswith("prefect_flux_kontext.deployments.")
        assert not deployment.pull_steps
        assert deployment.path in {None, ""}


def test_deploy_refuses_relative_paths(place):
    command = [sys.executable, "-m", "prefect_flux_kontext", "deploy", "in.csv", "--output", "out"]
    done = subprocess.run(
        command, env=place.environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "give in.csv, out as a URL or an absolute path. Nothing was deployed." in done.stderr


async def test_deployments_have_triggers_and_forms(place):
    async with get_client() as client:
        found = {name: await client.read_deployment_by_name(name) for name in NAMES}
        automations = {item.name: item for item in await client.read_automations()}
    assert {"flux-kontext, a manifest lands", "flux-kontext, a batch has left results"} <= set(
        automations
    )
    for name, deployment in found.items():
        assert deployment.description
        properties = deployment.parameter_openapi_schema["properties"]
        for parameter, schema in properties.items():
            assert schema.get("description"), (name, parameter)
        assert properties["output"]["examples"]
    nightly = found["style-transfer-batch/nightly-prefix"]
    assert nightly.parameters["manifest"] == place.environment["INCOMING"]
    assert nightly.parameters["output"] == place.environment["RESTYLED"]
    assert [schedule.schedule.cron for schedule in nightly.schedules] == ["0 2 * * *"]
    form = nightly.parameter_openapi_schema["properties"]
    assert form["wait"]["enum"] == ["poll", "suspend", "collect"]
    assert form["manifest"]["examples"]


async def test_nightly_run_is_scheduled(place):
    """Prefect 3.9.1 with whenever 0.10 schedules nothing on Python 3.11 and 3.12."""
    async with get_client() as client:
        nightly = await client.read_deployment_by_name("style-transfer-batch/nightly-prefix")
        only = DeploymentFilter(id=DeploymentFilterId(any_=[nightly.id]))
        for _ in range(300):
            runs = await client.read_flow_runs(deployment_filter=only)
            if "Scheduled" in {run.state_name for run in runs}:
                return
            await anyio.sleep(0.2)
    pytest.fail(f"no run is scheduled: {runs}")


async def test_announced_manifest_runs_and_failed_rows_are_retried(place):
    output, before = place.folder / "landed", place.count_paid()
    manifest = place.write_manifest("landed.csv", "a lighthouse", "nsfw")
    printed = place.run(
        "prefect_flux_kontext", "announce", "landed.csv", "--output", str(output), "--with", "a=b"
    )
    assert "Announced" in printed
    run = await wait_for_run("style-transfer-batch", output)
    assert run.parameters["manifest"] == manifest
    await wait_for_state(run.id, "Completed")
    assert (output / "row-0.jpg").exists()
    assert place.count_paid() - before == 2

    (output / "failed.csv").write_text("id,prompt\nrow-1,a harbour\n")
    again = await run_deployment(
        "retry-failed/retry-failed-on-demand",
        parameters={"output": str(output)},
        poll_interval=0.5,
    )
    assert again.state.is_completed(), again.state.message
    assert (output / "row-1.jpg").exists()
    assert place.count_paid() - before == 3


async def test_suspended_batch_holds_no_process_until_collected(place):
    output, before = place.folder / "suspended", place.count_paid()
    manifest = place.write_manifest("suspended.csv", *(f"a harbour {n}" for n in range(20)))
    run = await run_deployment(
        "style-transfer-batch/nightly-prefix",
        parameters={"manifest": manifest, "output": str(output), "wait": "suspend"},
        timeout=0,
    )
    run = await wait_for_state(run.id, "Suspended", "Resuming", "Completed")
    assert place.count_paid() - before == 20
    first = int(run.infrastructure_pid.rpartition(":")[2])
    assert await has_ended(first)
    # The event of the suspension starts the collection, which resumes the flow run.
    collecting = await wait_for_run("collect-batch", output)
    await wait_for_state(collecting.id, "Completed")
    run = await wait_for_state(run.id, "Completed")
    names = await read_state_names(run.id)
    assert names.count("Running") == 2
    assert names.index("Suspended") < names.index("Completed")
    assert int(run.infrastructure_pid.rpartition(":")[2]) != first
    assert len(list(output.glob("*.jpg"))) == 20
    assert place.count_paid() - before == 20


async def test_left_results_are_stored_by_the_next_flow(place):
    output, before = place.folder / "left", place.count_paid()
    manifest = place.write_manifest("left.csv", *(f"a ship {n}" for n in range(5)))
    run = await run_deployment(
        "style-transfer-batch/nightly-prefix",
        parameters={"manifest": manifest, "output": str(output), "wait": "collect"},
        poll_interval=0.5,
    )
    assert run.state.is_completed(), run.state.message
    collecting = await wait_for_run("collect-batch", output)
    await wait_for_state(collecting.id, "Completed")
    assert len(list(output.glob("*.jpg"))) == 5
    assert place.count_paid() - before == 5


async def test_flow_is_deployed_from_code_with_options(place):
    flow = await style_transfer_batch.from_source(
        str(place.folder), "flows/nightly_prefix.py:nightly_prefix"
    )
    await flow.with_options(retries=2).deploy(
        "of-my-own", work_pool_name=POOL, print_next_steps=False
    )
    run = await run_deployment(
        "style-transfer-batch/of-my-own",
        parameters={
            "manifest": place.write_manifest("own.csv", "a bridge"),
            "output": str(place.folder / "own"),
            "advanced": {"cadence": PollingCadence(initial_delay=0, interval=0.1).model_dump()},
        },
        poll_interval=0.5,
    )
    assert run.state.is_completed(), run.state.message
    assert (place.folder / "own" / "row-0.jpg").exists()
