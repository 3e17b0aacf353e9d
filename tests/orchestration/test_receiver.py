"""The receiver emits that results are ready, and resumes the flow runs that wait for them."""

import asyncio
import re
import shutil
import signal
import subprocess
import sys

import pytest
from prefect import Flow
from prefect.deployments import run_deployment
from prefect.settings import PREFECT_API_URL, temporary_settings

from prefect_flux_kontext.batch.collection import read_unfinished_entries
from prefect_flux_kontext.callbacks import completion
from prefect_flux_kontext.callbacks.inbox import INBOX_FOLDER, Callback, Inbox
from prefect_flux_kontext.cli import main
from prefect_flux_kontext.flows import style_transfer_batch
from prefect_flux_kontext.ledger.store import open_ledger_store
from prefect_flux_kontext.orchestration import events, receiver
from prefect_flux_kontext.orchestration.suspension import resume_suspended
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from prefect_flux_kontext.storage.filesystem import OutputFolder
from tests.orchestration.conftest import KEY, QUICK
from tests.orchestration.deployed import read_state_names, running_worker, wait_for_state
from tests.orchestration.records import post
from tests.orchestration.test_deployments import ROOT
from tests.orchestration.test_suspension import OWN_FLOW, create_suspended

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(400)]

SECRET = "a-secret-of-the-tests-0123456789"
POOL = "received"


@pytest.fixture
def environment(prefect_api, sandbox):
    """The variables of both the worker and the receiver."""
    return prefect_api.environment | {
        "FLUX_KONTEXT_API_KEY": KEY,
        "FLUX_KONTEXT_BASE_URL": sandbox.url,
        "FLUX_KONTEXT_POLL_INITIAL_DELAY": "0",
        "FLUX_KONTEXT_POLL_INTERVAL": "0.1",
        "FLUX_KONTEXT_CALLBACK_SECRET": SECRET,
        "PYTHONPATH": str(ROOT),
        "PREFECT_WORKER_QUERY_SECONDS": "1",
    }


@pytest.fixture
def receiver_url(environment, tmp_path):
    """The URL of `flux-kontext receive --resume` for the output."""
    command = ["receive", str(tmp_path / "out"), "--resume", "--port=0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "prefect_flux_kontext", *command],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        yield re.search(r"http://\S+", process.stdout.readline())[0]
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate()
    assert process.returncode == 0


async def create_pool(environment):
    command = ["work-pool", "create", POOL, "--type", "process", "--overwrite"]
    await asyncio.to_thread(
        subprocess.run, [sys.executable, "-m", "prefect", *command], env=environment, check=True
    )


async def wait_for_ready_events(output):
    """Wait until the server has events that the results of an output are ready; return them."""
    wanted = {
        "event": {"name": [events.RESULTS_READY]},
        "resource": {"id": [f"flux-kontext.output.file://{output}"]},
    }
    for _ in range(300):
        found = (await post("/events/filter", {"filter": wanted}))["events"]
        if found:
            return found
        await asyncio.sleep(0.1)
    raise AssertionError("no such event")


async def test_receiver_resumes_a_suspended_batch(environment, receiver_url, sandbox, tmp_path):
    shutil.copytree(ROOT / "flows", tmp_path / "flows")
    output, manifest = tmp_path / "out", tmp_path / "manifest.csv"
    lines = [f"row-{number},a harbour {number}" for number in range(20)]
    manifest.write_text("\n".join(["id,prompt", *lines]))
    with_callbacks = environment | {"FLUX_KONTEXT_CALLBACK_URL": receiver_url}
    await create_pool(environment)
    flow = await style_transfer_batch.from_source(
        str(tmp_path), "flows/nightly_prefix.py:nightly_prefix"
    )
    await flow.deploy("called-back", work_pool_name=POOL, print_next_steps=False)
    with running_worker(POOL, tmp_path, with_callbacks):
        run = await run_deployment(
            "style-transfer-batch/called-back",
            parameters={"manifest": str(manifest), "output": str(output), "wait": "suspend"},
            timeout=0,
        )
        await wait_for_state(run.id, "Suspended", "Resuming")
        run = await wait_for_state(run.id, "Completed")
    names = await read_state_names(run.id)
    assert names.count("Running") == 2
    assert names.index("Suspended") < names.index("Resuming") < names.index("Completed")
    assert len(list(output.glob("*.jpg"))) == 20
    assert sandbox.service.bill()["accepted"] == 20
    (event,) = await wait_for_ready_events(output)
    assert event["payload"] == {"output": f"file://{output}", "rows": 20}


async def test_receiver_resumes_an_own_flow(environment, receiver_url, tmp_path):
    output = tmp_path / "out"
    (tmp_path / "own_flow.py").write_text(OWN_FLOW)
    slow = SandboxSettings(mean=4, spread=0, long_edge=16, api_key=KEY)
    with running_sandbox(slow) as sandbox:
        variables = {
            "FLUX_KONTEXT_BASE_URL": sandbox.url,
            "FLUX_KONTEXT_CALLBACK_URL": receiver_url,
        }
        await create_pool(environment)
        own = await Flow.from_source(str(tmp_path), "own_flow.py:own")
        await own.deploy("called-back", work_pool_name=POOL, print_next_steps=False)
        with running_worker(POOL, tmp_path, environment | variables):
            run = await run_deployment(
                "own/called-back", parameters={"output": str(output)}, timeout=0
            )
            await wait_for_state(run.id, "Suspended", "Resuming")
            run = await wait_for_state(run.id, "Completed")
        assert (await read_state_names(run.id)).count("Running") == 2
        assert len(list(output.glob("*.jpg"))) == 5
        assert sandbox.service.bill()["accepted"] == 5
        # Each task is polled before the flow is suspended, after it is resumed, and in its wait.
        assert sandbox.active_faults.numbers["status"] <= 15


async def test_run_suspended_after_its_callbacks_is_resumed(account, tmp_path, monkeypatch):
    monkeypatch.setattr(completion, "_QUIET", 0)
    monkeypatch.setattr(completion, "_AGAIN", 0)
    how = {"credentials": account, "cadence": QUICK, "wait": "collect"}
    await style_transfer_batch([{"id": "a", "prompt": "a lighthouse"}], str(tmp_path), **how)
    output = OutputFolder(str(tmp_path))
    (entry,) = await read_unfinished_entries(open_ledger_store(output))
    inbox = Inbox(open_ledger_store(output).below(INBOX_FOLDER))
    callback = Callback(owner=entry.intent.owner, key=entry.key, number=entry.attempt)
    calls, found = [], asyncio.Event()

    async def resume_late(output):
        calls.append(output)
        if len(calls) == 2:
            await create_suspended(output)
        resumed = await resume_suspended(output)
        if resumed:
            found.set()
        return resumed

    monkeypatch.setattr(receiver, "resume_suspended", resume_late)
    async with receiver.resume_on_completion(output, inbox):
        await inbox.keep(callback)
        await found.wait()
    assert len(calls) == 2
    assert len(await wait_for_ready_events(tmp_path)) == 1


def test_receiver_with_resume_needs_an_api_url(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FLUX_KONTEXT_CALLBACK_SECRET", SECRET)
    with temporary_settings({PREFECT_API_URL: None}):
        assert main(["receive", str(tmp_path), "--port=0", "--resume"]) == 2
    assert "PREFECT_API_URL" in capsys.readouterr().err


def test_resume_needs_an_output(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FLUX_KONTEXT_CALLBACK_SECRET", SECRET)
    assert main(["receive", "--inbox", str(tmp_path), "--port=0", "--resume"]) == 2
    assert "name OUTPUT in place of --inbox" in capsys.readouterr().err
