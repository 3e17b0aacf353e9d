"""The three tasks with a ledger: a request is paid for once, however often it is run."""

import asyncio
import shutil
from datetime import timedelta

import pytest
from prefect import flow, task, unmapped
from prefect.filesystems import LocalFileSystem

from prefect_flux_kontext import (
    GenerationRequest,
    persist_images,
    submit_generation,
    wait_for_generation,
)
from prefect_flux_kontext.batch import single
from prefect_flux_kontext.batch.status import read_ledger_status
from prefect_flux_kontext.batch.submission import Submitter
from prefect_flux_kontext.cli import main
from prefect_flux_kontext.errors import (
    ConfigurationError,
    GenerationFailedError,
    ReplyLostError,
)
from prefect_flux_kontext.flows import collect_batch, style_transfer
from prefect_flux_kontext.ledger.heartbeat import keep_heartbeat
from prefect_flux_kontext.ledger.store import RecordStore, open_ledger_store
from prefect_flux_kontext.models import utc_now
from prefect_flux_kontext.sandbox.faults.plan import FaultPlan
from prefect_flux_kontext.storage.filesystem import OutputFolder
from tests.orchestration.conftest import QUICK

pytestmark = pytest.mark.anyio

REQUEST = GenerationRequest(prompt="a lighthouse", aspect_ratio="1:1")


def accepted(sandbox):
    return sandbox.service.bill()["accepted"]


def make_flow(account, output, *, dies_after=None, key=None, **options):
    deaths = [dies_after]

    def die(step):
        if deaths[0] == step:
            deaths[0] = None
            raise RuntimeError(f"died after {step}")

    @flow(**options)
    async def restyle():
        submitted = await submit_generation(REQUEST, account, output, key)
        die("submit")
        result = await wait_for_generation(submitted, account, QUICK)
        die("wait")
        (image,) = await persist_images(result, output, "lighthouse")
        die("persist")
        return image

    return restyle


@pytest.mark.parametrize("step", ["submit", "wait", "persist"])
async def test_retried_flow_pays_once(account, sandbox, tmp_path, step):
    image = await make_flow(account, str(tmp_path), dies_after=step, retries=2)()
    assert image.uri.endswith("/lighthouse.jpg")
    assert accepted(sandbox) == 1
    status = await read_ledger_status(open_ledger_store(OutputFolder(tmp_path)))
    assert (status.states, status.spent) == ({"stored": 1}, 0.03)


async def test_second_flow_run_returns_the_stored_image(account, sandbox, tmp_path):
    first = await make_flow(account, str(tmp_path))()
    sandbox.active_faults.change(FaultPlan(faults=["status:not-found", "download:not-found"]))
    assert await make_flow(account, str(tmp_path))() == first
    assert accepted(sandbox) == 1


async def test_flows_beside_each_other_pay_once(account, sandbox, tmp_path):
    flows = [make_flow(account, str(tmp_path)) for _ in range(4)]
    images = await asyncio.gather(*(restyle() for restyle in flows))
    assert len({image.uri for image in images}) == 1
    assert accepted(sandbox) == 1


async def test_key_makes_equal_requests_two(account, sandbox, tmp_path):
    for key in ("one", "two", "one"):
        await make_flow(account, str(tmp_path), key=key)()
    assert accepted(sandbox) == 2


async def test_ledger_of_the_environment_is_used(account, sandbox, tmp_path, monkeypatch):
    monkeypatch.setenv("FLUX_KONTEXT_LEDGER", str(tmp_path))
    for _ in range(2):
        submitted = await submit_generation(REQUEST, account)
    assert accepted(sandbox) == 1
    assert submitted.ledger == f"file://{tmp_path}"


async def test_failed_task_is_returned_and_not_paid_again(account, sandbox, tmp_path):
    request = GenerationRequest(prompt="a nsfw lighthouse")
    for _ in range(2):
        submitted = await submit_generation(request, account, str(tmp_path))
        with pytest.raises(GenerationFailedError) as caught:
            await wait_for_generation(submitted, account, QUICK)
        assert caught.value.code == "CONTENT_VIOLATION"
        sandbox.active_faults.change(FaultPlan(faults=["status:not-found"]))
    assert accepted(sandbox) == 1


async def test_lost_reply_is_settled_by_a_command(account, sandbox, tmp_path, capsys, monkeypatch):
    sandbox.active_faults.change(FaultPlan(faults=["submit:lost-reply@1"]))
    for _ in range(2):
        with pytest.raises(ReplyLostError, match="flux-kontext resolve") as caught:
            await submit_generation(REQUEST, account, str(tmp_path))
    assert accepted(sandbox) == 1
    words = str(caught.value).split("flux-kontext resolve ")[1].split()
    [record] = sandbox.service.records()
    command = ["resolve", words[0], words[1], "--accepted", record["taskId"]]
    assert await asyncio.to_thread(main, command) == 1
    assert "right now" in capsys.readouterr().err
    # A process that lives and has recorded no outcome for minutes will not do so any more.
    later = utc_now() + timedelta(minutes=4)
    monkeypatch.setattr("prefect_flux_kontext.ledger.ledger.utc_now", lambda: later)
    status = await read_ledger_status(open_ledger_store(OutputFolder(tmp_path)))
    assert len(status.unknown) == 1
    assert await asyncio.to_thread(main, command) == 0, capsys.readouterr()
    submitted = await submit_generation(REQUEST, account, str(tmp_path))
    assert submitted.task_id == record["taskId"]
    assert accepted(sandbox) == 1


async def test_collect_stores_what_a_dead_flow_has_paid_for(
    account, account_in_environment, sandbox, tmp_path
):
    output = tmp_path / "out"
    await submit_generation(REQUEST, account, str(output))
    # As after the end of the process: its owner record is gone.
    shutil.rmtree(output / "_ledger" / "owners")
    summary = await collect_batch(str(output), account)
    assert summary.stored == 1
    assert len(list(output.glob("*.jpg"))) == 1
    assert accepted(sandbox) == 1


async def test_task_is_refused_while_a_run_keeps_a_budget(account, sandbox, tmp_path):
    store = open_ledger_store(OutputFolder(tmp_path))
    async with keep_heartbeat(store, has_budget=True):
        with pytest.raises(ConfigurationError, match="budget"):
            await submit_generation(REQUEST, account, str(tmp_path))
    await submit_generation(REQUEST, account, str(tmp_path))
    assert accepted(sandbox) == 1


async def test_images_may_be_stored_elsewhere(account, sandbox, tmp_path):
    ledger, output = tmp_path / "ledger", tmp_path / "images"
    submitted = await submit_generation(REQUEST, account, str(ledger))
    result = await wait_for_generation(submitted, account, QUICK)
    (image,) = await persist_images(result, str(output), "cat")
    assert image.uri == f"file://{output}/cat.jpg"
    again = await wait_for_generation(submitted, account, QUICK)
    assert await persist_images(again, str(output), "cat") == [image]
    assert accepted(sandbox) == 1


async def test_saved_block_is_a_ledger(account, sandbox, tmp_path):
    block = LocalFileSystem(basepath=str(tmp_path))
    with pytest.raises(ConfigurationError, match="not saved"):
        await submit_generation(REQUEST, account, block)
    await block.asave("ledger-of-the-tests", overwrite=True)
    submitted = await submit_generation(REQUEST, account, block)
    assert submitted.ledger == "block:local-file-system/ledger-of-the-tests"
    result = await wait_for_generation(submitted, account, QUICK)
    await persist_images(result, block)
    assert accepted(sandbox) == 1


def test_mapped_submits_pay_once_each(account, sandbox, tmp_path):
    requests = [GenerationRequest(prompt=f"a lighthouse {n % 10}") for n in range(20)]

    @flow
    def restyle():
        output = unmapped(str(tmp_path))
        submitted = submit_generation.map(requests, unmapped(account), output)
        results = wait_for_generation.map(submitted, unmapped(account), unmapped(QUICK))
        return persist_images.map(results, output).result()

    for _ in range(2):
        assert len(restyle()) == 20
    assert accepted(sandbox) == 10
    assert len(list((tmp_path / "_ledger" / "owners").iterdir())) == 1
    status = asyncio.run(read_ledger_status(open_ledger_store(OutputFolder(tmp_path))))
    assert status.states == {"stored": 10}


async def test_few_submits_are_under_way(account, sandbox, tmp_path, monkeypatch):
    monkeypatch.setenv("FLUX_KONTEXT_CONCURRENT_SUBMITS", "2")
    numbers, submit = [], Submitter.submit

    async def counted(*args):
        numbers.append(len(single._under_way))
        return await submit(*args)

    monkeypatch.setattr(Submitter, "submit", counted)
    requests = [GenerationRequest(prompt=f"a lighthouse {n}") for n in range(6)]
    await asyncio.gather(
        *(submit_generation(request, account, str(tmp_path)) for request in requests)
    )
    assert accepted(sandbox) == 6
    assert max(numbers) == 2


def test_image_takes_four_ledger_writes(account, sandbox, tmp_path, monkeypatch):
    written = []

    def record(name):
        original = getattr(RecordStore, name)

        async def recorded(store, path, *data):
            if str(tmp_path) in str(store):  # other ledgers have owners in this process too
                written.append(path)
            return await original(store, path, *data)

        monkeypatch.setattr(RecordStore, name, recorded)

    for name in ("create", "replace", "remove"):
        record(name)
    monkeypatch.setenv("FLUX_KONTEXT_HEARTBEAT", "600")
    requests = [GenerationRequest(prompt=f"a lighthouse {n}") for n in range(8)]

    @flow
    def restyle():
        output = unmapped(str(tmp_path))
        submitted = submit_generation.map(requests, unmapped(account), output)
        results = wait_for_generation.map(submitted, unmapped(account), unmapped(QUICK))
        return persist_images.map(results, output).result()

    for _ in range(2):
        assert len(restyle()) == 8
    by_folder = {
        folder: [path for path in written if path.startswith(folder)]
        for folder in ("owners/", "probe/", "format.json")
    }
    assert len(by_folder["owners/"]) == 1
    assert len(set(by_folder["probe/"])) == 1
    assert len(written) - sum(map(len, by_folder.values())) == 4 * 8


async def test_style_transfer_uses_its_output_as_ledger(account, sandbox, tmp_path):
    for _ in range(2):
        (image,) = await style_transfer(
            "a lighthouse", str(tmp_path), credentials=account, cadence=QUICK
        )
    assert accepted(sandbox) == 1
    await style_transfer(
        "a lighthouse", str(tmp_path), credentials=account, cadence=QUICK, key="again"
    )
    assert accepted(sandbox) == 2
    assert image.uri.startswith(f"file://{tmp_path}")


def test_sync_flow_calls_the_tasks_plainly(account, sandbox, tmp_path):
    @flow
    def restyle():
        submitted = submit_generation(REQUEST, account)
        result = wait_for_generation(submitted, account, QUICK)
        return persist_images.with_options(retries=1)(result, str(tmp_path), "lighthouse")

    (image,) = restyle()
    assert image.uri == f"file://{tmp_path}/lighthouse.jpg"


def test_sync_task_and_script_call_the_tasks_plainly(account, sandbox):
    @task
    def submit():
        return submit_generation(REQUEST, account)

    @flow
    def restyle():
        return submit()

    assert restyle().task_id
    assert submit_generation(REQUEST, account).task_id


async def test_coroutine_as_an_argument_is_reported(account):
    @flow
    async def forgetful():
        return await wait_for_generation(submit_generation(REQUEST, account), account)

    with pytest.raises(TypeError, match="await"):
        await forgetful()
