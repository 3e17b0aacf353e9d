"""Batches in partitions on two real workers, one of which is killed."""

import asyncio
import json
import os
import signal
import uuid
from collections import Counter
from contextlib import ExitStack

import anyio
import pyarrow as pa
import pytest
from prefect import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

from prefect_flux_kontext import FluxKontextCredentials, PollingCadence
from prefect_flux_kontext.errors import BudgetReachedError, ConfigurationError
from prefect_flux_kontext.flows import style_transfer_batch
from prefect_flux_kontext.ledger.heartbeat import is_alive
from prefect_flux_kontext.ledger.store import open_ledger_store
from prefect_flux_kontext.orchestration.events import (
    BATCH_FINISHED,
    BATCH_STARTED,
    SPEND_ABOVE,
    WAVE_FINISHED,
)
from prefect_flux_kontext.orchestration.partitions import coordinator
from prefect_flux_kontext.orchestration.partitions.flow import style_transfer_partition
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from prefect_flux_kontext.storage.filesystem import OutputFolder
from tests.orchestration.conftest import flush_to_prefect
from tests.orchestration.deployed import wait_for_state
from tests.orchestration.partition_workers import (
    ROOT,
    PartitionWorkers,
    deploy,
    find_process,
    find_runs,
    read_parent,
    wait_until,
)
from tests.orchestration.records import read_all_events, read_artifacts, read_our_events

SLOTS = 40
QUICK = PollingCadence(initial_delay=0, interval=0.2, timeout=60)
DEPLOYMENT = "style-transfer-partition/tested"
WITHOUT_WORKERS = "style-transfer-partition/without-workers"

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def workers(prefect_api, tmp_path_factory):
    flush_to_prefect()  # a broken connection of an earlier module is not used again
    asyncio.run(deploy("tested", pool="partitions"))
    asyncio.run(deploy("without-workers", pool="without-workers"))
    folder = tmp_path_factory.mktemp("partitions")
    # The sandbox's limits are far above the account's, so that it can see them exceeded.
    settings = SandboxSettings(mean=0.5, long_edge=16, requests_per_minute=100_000)
    with ExitStack() as stack:
        sandbox = stack.enter_context(running_sandbox(settings))
        environment = prefect_api.environment | {
            "FLUX_KONTEXT_GALLERY_REFERENCES": "false",
            "PYTHONPATH": str(ROOT),
            "PREFECT_WORKER_QUERY_SECONDS": "1",
        }
        workers = PartitionWorkers(folder, environment, sandbox, stack)
        for _ in range(2):
            workers.start_worker()
        yield workers
        # The workers are idle, and some take a minute to stop.
        for worker in workers.processes.values():
            os.killpg(worker.pid, signal.SIGKILL)


@pytest.fixture
async def account(workers, prefect_api):
    """The name of a saved account with a limit that no other test uses."""
    name = f"account-{uuid.uuid4()}"
    block = FluxKontextCredentials(
        api_key=name, base_url=workers.sandbox.url, account=name, concurrent_tasks=SLOTS
    )
    await block.save(name)
    return name


@pytest.fixture(autouse=True)
def _check_often(monkeypatch):
    monkeypatch.setattr(coordinator, "CHECK_INTERVAL_SECONDS", 0.3)


def rows(number):
    """Return rows with prompts of their own, and a text that all these prompts contain."""
    text = str(uuid.uuid4())
    return [{"id": f"row-{n}", "prompt": f"{text} {n}"} for n in range(number)], text


def batch(name=None):
    return style_transfer_batch.with_options(flow_run_name=name or str(uuid.uuid4()))


async def test_partitions_keep_limits_and_report_once(workers, account, tmp_path):
    given, text = rows(600)
    name = str(uuid.uuid4())
    summary = await batch(name)(
        given,
        str(tmp_path),
        account,
        cadence=QUICK,
        partitions=2,
        partition_deployment=DEPLOYMENT,
        alert_above_usd=1.0,
    )
    assert (summary.rows, summary.stored, summary.already_stored) == (600, 600, 0)
    assert summary.spent == pytest.approx(18.0)
    assert set(workers.count_paid(text=text).values()) == {1}
    assert len(workers.count_paid(text=text)) == 600
    assert len(list(tmp_path.glob("*.jpg"))) == 600
    lines = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert [line["line"] for line in lines] == list(range(1, 601))
    assert (tmp_path / "gallery.html").exists()
    bill = workers.sandbox.service.bill()
    # Partitions that each used the whole account would run 80 tasks. A few more than 40 are tasks
    # that the limiter expected to have ended before they were polled.
    assert bill["peak_running"] < 1.5 * SLOTS

    runs = {run.name: run for run in await find_runs(name)}
    partitions = [f"{name}-partition-{number}-of-2" for number in (1, 2)]
    assert set(runs) == {name, *partitions}
    counts = Counter(
        event["event"]
        for event in await read_our_events(
            runs[name].id, BATCH_STARTED, BATCH_FINISHED, SPEND_ABOVE
        )
    )
    assert counts.pop("prefect.asset.materialization.succeeded") == 1
    assert counts == {BATCH_STARTED: 1, BATCH_FINISHED: 1, SPEND_ABOVE: 1}
    for partition in partitions:
        found = await read_our_events(runs[partition].id, WAVE_FINISHED)
        assert [event["event"] for event in found] == [WAVE_FINISHED] * 2
        assert await read_artifacts(runs[partition].id) == {}
    assert set(await read_artifacts(runs[name].id)) == {"progress", "markdown"}
    # At most one task run and ten events for each hundred images.
    events = {
        event["id"]: event["event"]
        for run in runs.values()
        for event in await read_all_events(run.id)
    }
    # The number of heartbeats depends on the speed of the machine.
    counted = [event for event in events.values() if event != "prefect.flow-run.heartbeat"]
    assert len(counted) <= 60, Counter(counted)
    async with get_client() as client:
        for run in runs.values():
            only = FlowRunFilter(id=FlowRunFilterId(any_=[run.id]))
            assert len(await client.read_task_runs(flow_run_filter=only)) == 2 * (run.name != name)

    again = await batch()(
        given,
        str(tmp_path),
        account,
        cadence=QUICK,
        partitions=2,
        partition_deployment=WITHOUT_WORKERS,
    )
    assert (again.stored, again.already_stored, again.spent) == (600, 600, 0.0)
    assert sum(workers.count_paid(text=text).values()) == 600


async def test_partition_of_a_killed_worker_is_finished(workers, account, tmp_path, monkeypatch):
    monkeypatch.setattr(coordinator, "HEARTBEAT_TIMEOUT_SECONDS", 15.0)
    given, text = rows(240)
    name = str(uuid.uuid4())
    ended = []

    async def run():
        summary = await batch(name)(
            given,
            str(tmp_path),
            account,
            cadence=QUICK,
            partitions=2,
            partition_deployment=DEPLOYMENT,
        )
        ended.append(summary)

    def count_paid_by_second():
        # Of two partitions, each has every second row.
        return sum(int(prompt.split()[1]) % 2 for prompt in workers.count_paid(text=text))

    async with anyio.create_task_group() as group:
        group.start_soon(run)
        await wait_until(lambda: count_paid_by_second() >= 1)
        killed, process = await find_process(f"{name}-partition-2")
        worker = workers.processes.pop(read_parent(process))
        await wait_until(lambda: count_paid_by_second() >= 30)
        worker.kill()
        os.kill(process, signal.SIGKILL)
        assert not ended
        workers.start_worker()
    (summary,) = ended
    paid = workers.count_paid(text=text)
    assert set(paid.values()) == {1}
    # Rows whose POST was in flight are unknown, and not paid for again.
    assert summary.stored + summary.unknown == summary.rows == 240
    assert summary.unknown <= SLOTS / 2
    assert summary.spent == pytest.approx(0.03 * 240)
    assert len(paid) >= summary.stored == len(list(tmp_path.glob("*.jpg")))
    states = sorted(run.state_name for run in await find_runs(f"{name}-partition"))
    assert "Completed" in states
    (killed,) = [run for run in await find_runs(f"{name}-partition-2") if run.id == killed.id]
    assert killed.state_name == "Crashed"


async def test_partitions_keep_the_budget_together(workers, account, tmp_path):
    given, text = rows(60)
    with pytest.raises(BudgetReachedError, match="40 of 60 rows stored"):
        await batch()(
            given,
            str(tmp_path),
            account,
            cadence=QUICK,
            partitions=2,
            partition_deployment=DEPLOYMENT,
            budget_usd=1.2,
        )
    assert sum(workers.count_paid(text=text).values()) == 40


@pytest.mark.parametrize("kind", ["long list", "table"])
async def test_runs_of_partitions_record_no_rows(workers, account, tmp_path, kind):
    """More rows than Prefect takes as parameters, from any source that is no file."""
    given, text = rows(1_700 if kind == "long list" else 40)
    if kind == "long list":
        given = [{**row, "note": "x" * 300} for row in given]
        assert len(json.dumps(given)) > 524_288
    name = str(uuid.uuid4())
    summary = await batch(name)(
        given if kind == "long list" else pa.Table.from_pylist(given),
        str(tmp_path),
        account,
        cadence=QUICK,
        partitions=2,
        partition_deployment=DEPLOYMENT,
    )
    assert summary.stored == summary.rows == len(given)
    assert set(workers.count_paid(text=text).values()) == {1}
    runs = await find_runs(f"{name}-partition")
    assert [run.state_name for run in runs] == ["Completed"] * 2
    assert all(text not in json.dumps(run.parameters) for run in runs)
    assert not list(tmp_path.glob("_partitions/*"))


async def test_partitions_lease_from_a_named_limit(workers, account, tmp_path):
    limit = f"my account {uuid.uuid4()}"
    async with get_client() as client:
        new = GlobalConcurrencyLimitCreate(name=limit, limit=SLOTS)
        await client.create_global_concurrency_limit(new)
    given, _ = rows(20)
    name = str(uuid.uuid4())
    summary = await batch(name)(
        given,
        str(tmp_path),
        account,
        cadence=QUICK,
        partitions=2,
        partition_deployment=DEPLOYMENT,
        account_limit=limit,
    )
    assert summary.stored == 20
    assert all(limit in run.tags for run in await find_runs(f"{name}-partition"))


async def test_partitions_keep_budgets_by_column_together(workers, account, tmp_path):
    given, text = rows(40)
    for number, row in enumerate(given):
        row["team"] = "blue" if number < 20 else "red"
    summary = await batch()(
        given,
        str(tmp_path),
        account,
        cadence=QUICK,
        partitions=2,
        partition_deployment=DEPLOYMENT,
        budget_by={"team": {"blue": 0.22}},
        spend_by=["team"],
    )
    assert (summary.stored, summary.not_submitted) == (27, 13)
    groups = {group.columns["team"]: group.spent for group in summary.spent_by}
    assert groups == pytest.approx({"blue": 0.21, "red": 0.60})
    assert sum(workers.count_paid(text=text).values()) == 27
    assert summary.balance_before - summary.balance_after == pytest.approx(0.81)


class TestWithoutWorkers:
    async def test_batch_runs_partitions_that_no_worker_begins(
        self, workers, account, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(coordinator, "START_TIMEOUT_SECONDS", 0.5)
        given, text = rows(20)
        name = str(uuid.uuid4())
        summary = await batch(name)(
            given,
            str(tmp_path),
            account,
            cadence=QUICK,
            partitions=2,
            partition_deployment=WITHOUT_WORKERS,
        )
        assert (summary.stored, summary.already_stored) == (20, 0)
        assert summary.spent == pytest.approx(0.6)
        assert set(workers.count_paid(text=text).values()) == {1}
        for run in await find_runs(f"{name}-partition"):
            await wait_for_state(run.id, "Cancelled")

    async def test_cancelled_batch_cancels_its_partitions(self, workers, account, tmp_path):
        given, text = rows(20)
        name = str(uuid.uuid4())
        running = asyncio.create_task(
            batch(name)(
                given,
                str(tmp_path),
                account,
                cadence=QUICK,
                partitions=2,
                partition_deployment=WITHOUT_WORKERS,
            )
        )
        partitions = []
        async with asyncio.timeout(300):
            while len(partitions) < 2:
                await anyio.sleep(0.1)
                partitions = await find_runs(f"{name}-partition")
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        for run in partitions:
            await wait_for_state(run.id, "Cancelled")
        assert not workers.count_paid(text=text)


class TestRefusal:
    async def run_refused(self, account, tmp_path, **how):
        given, _ = rows(2)
        with pytest.raises(ConfigurationError) as error:
            await batch()(
                how.pop("manifest", given),
                str(tmp_path),
                account,
                partitions=2,
                **{"partition_deployment": DEPLOYMENT, **how},
            )
        assert not list(tmp_path.iterdir())
        return str(error.value)

    async def test_wait_other_than_poll_is_refused(self, workers, account, tmp_path):
        assert "not possible with partitions" in await self.run_refused(
            account, tmp_path, wait="collect"
        )

    async def test_missing_deployment_is_refused(self, workers, account, tmp_path):
        message = await self.run_refused(
            account, tmp_path, partition_deployment="style-transfer-partition/none"
        )
        assert "flux-kontext deploy" in message

    async def test_unsaved_block_is_refused(self, workers, tmp_path):
        block = FluxKontextCredentials(api_key="a", base_url=workers.sandbox.url)
        assert "Save it" in await self.run_refused(block, tmp_path)

    async def test_listening_for_callbacks_is_refused(
        self, workers, account, tmp_path, monkeypatch
    ):
        monkeypatch.setenv("FLUX_KONTEXT_CALLBACK_LISTEN", "127.0.0.1:8780")
        assert "flux-kontext receive" in await self.run_refused(account, tmp_path)


async def test_partition_with_a_budget_share_runs_once(workers, account, tmp_path):
    partition = {"number": 1, "of": 2, "budget_usd": 0.03}
    retried = style_transfer_partition.with_options(retries=1)
    with pytest.raises(ConfigurationError, match="ran before"):
        await retried(partition, str(tmp_path / "none.csv"), str(tmp_path / "out"), account)


async def test_partition_has_a_heartbeat_only_while_it_runs(workers, account, tmp_path):
    given, _ = rows(4)
    partition = {"number": 2, "of": 2}
    block = await FluxKontextCredentials.aload(account)
    with pytest.raises(ConfigurationError, match="flux-kontext limits create"):
        await style_transfer_partition(
            partition, given, str(tmp_path), block, advanced={"cadence": QUICK}
        )
    store = open_ledger_store(OutputFolder(tmp_path))
    assert await store.list_names("owners") == []
    assert not await is_alive(store, "0" * 32)
