"""A pilot in a flow run of a real worker, approved by Resume."""

import subprocess
import sys

import pytest
from prefect import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.flow_runs import aresume_flow_run

from prefect_flux_kontext.orchestration.run_page import build_artifact_key
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from tests.docs.blocks import ROOT
from tests.orchestration.conftest import KEY
from tests.orchestration.deployed import running_worker, wait_for_state


@pytest.mark.anyio
async def test_pilot_on_a_worker_waits_for_resume(prefect_api, tmp_path):
    (tmp_path / "m.csv").write_text(
        "id,prompt\n" + "".join(f"{n},A lighthouse {n}\n" for n in range(8))
    )
    output = tmp_path / "out"
    with running_sandbox(SandboxSettings(mean=0.2, long_edge=64, api_key=KEY)) as sandbox:
        environment = prefect_api.environment | {
            "FLUX_KONTEXT_API_KEY": KEY,
            "FLUX_KONTEXT_BASE_URL": sandbox.url,
            "FLUX_KONTEXT_POLL_INITIAL_DELAY": "0",
            "FLUX_KONTEXT_POLL_INTERVAL": "0.1",
            "PYTHONPATH": str(ROOT),
            "PREFECT_WORKER_QUERY_SECONDS": "1",
        }

        def prefect(*words):
            command = [sys.executable, "-m", "prefect", "--no-prompt", *words]
            subprocess.run(command, cwd=tmp_path, env=environment, check=True)

        prefect("work-pool", "create", "pilots", "--type", "process")
        entrypoint = f"{ROOT}/prefect_flux_kontext/flows.py:style_transfer_batch"
        prefect("deploy", entrypoint, "--name", "pilot", "--pool", "pilots")
        async with get_client() as client:
            deployment = await client.read_deployment_by_name("style-transfer-batch/pilot")
            parameters = {"manifest": str(tmp_path / "m.csv"), "output": str(output)}
            parameters["advanced"] = {"pilot": 3}
            run = await client.create_flow_run_from_deployment(
                deployment.id, parameters=parameters
            )
        with running_worker("pilots", tmp_path, environment):
            await wait_for_state(run.id, "Paused")
            assert sandbox.service.bill()["accepted"] == 3
            await aresume_flow_run(run.id)
            run = await wait_for_state(run.id, "Completed")
        assert run.state.message == "8 of 8 stored, $0.15"
        assert sandbox.service.bill()["accepted"] == 8
    async with get_client() as client:
        key = build_artifact_key(f"file://{output}", "plan")
        (page,) = await client.read_artifacts(
            artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key]))
        )
    assert "# Resume to pay $0.15 for 5 images" in page.data
    assert "![pilot](data:image/webp;base64," in page.data
