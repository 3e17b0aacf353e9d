"""A batch in partitions with Prefect's servers on PostgreSQL, as in docs/many-machines.md."""

import asyncio
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import asyncpg
import httpx
import pytest

from prefect_flux_kontext.cli.prefect_server import prefect_server
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from tests.orchestration.deployed import running_worker
from tests.support import postgres, redis

ROOT = Path(__file__).parents[2]
KEY = "key-of-the-tests"

# A flow run without a deployment can run a batch in partitions too.
PROGRAM = """
import asyncio, sys
from prefect import get_client
from prefect.exceptions import ObjectNotFound
from prefect_flux_kontext.flows import style_transfer_batch
from prefect_flux_kontext.orchestration.partitions.flow import style_transfer_partition

async def find_pool():
    async with get_client() as client:
        try:
            return await client.read_work_pool("partitions")
        except ObjectNotFound:
            return None

async def main(root, output):
    while not await find_pool():
        await asyncio.sleep(0.2)
    entrypoint = "flows/partition_of_batch.py:partition_of_batch"
    partition = await style_transfer_partition.from_source(root, entrypoint)
    await partition.deploy(
        "partition-of-batch", work_pool_name="partitions", print_next_steps=False
    )
    rows = [{"id": f"row-{n}", "prompt": f"a lighthouse {n}"} for n in range(40)]
    summary = await style_transfer_batch(rows, output, partitions=2)
    print("\\n" + summary.model_dump_json())

asyncio.run(main(*sys.argv[1:]))
"""

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(postgres.find_obstacle() is not None, reason=str(postgres.find_obstacle())),
]


def test_batch_in_partitions_completes_on_postgres(tmp_path):
    leases = "prefect.server.concurrency.lease_storage.filesystem"
    settings = {"PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": leases}
    with (
        postgres.running_postgres() as database,
        run_server(tmp_path / "prefect", database, settings) as server,
    ):
        check_batch_in_partitions(tmp_path, server, server, database)


@pytest.mark.skipif(redis.find_obstacle() is not None, reason=str(redis.find_obstacle()))
def test_batch_in_partitions_completes_on_two_servers(tmp_path):
    """The worker uses one server and the batch the other; each shows the events of both."""
    with (
        postgres.running_postgres() as database,
        redis.running_redis() as messages,
        run_server(tmp_path / "a", database, read_redis_settings(messages)) as first,
        run_server(tmp_path / "b", database, read_redis_settings(messages)) as second,
    ):
        check_batch_in_partitions(tmp_path, first, second, database)
        for server in (first, second):
            names = read_event_names(server)
            assert names["flux-kontext.batch.finished"] == 1
            assert names["flux-kontext.wave.finished"] == 2
            assert names["prefect.flow-run.Completed"] == 3


def run_server(home, database, settings):
    settings = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": database, **settings}
    return prefect_server(home, settings=settings)


def read_redis_settings(url):
    """Return the settings of docs/many-machines.md for several servers."""
    page = (ROOT / "docs" / "many-machines.md").read_text()
    found = re.findall(r"^\$ export (\w+)=(\S*redis\S*)", page, re.MULTILINE)
    assert len(found) == 6
    return {name: text.replace("redis://redis.example.com:6379", url) for name, text in found}


def read_event_names(server):
    """Return how many events of each name a server shows."""
    only = {"occurred": {}, "event": {"prefix": ["flux-kontext.", "prefect.flow-run.Completed"]}}
    reply = httpx.post(f"{server.url}/api/events/filter", json={"filter": only, "limit": 50})
    return Counter(event["event"] for event in reply.raise_for_status().json()["events"])


def check_batch_in_partitions(folder, of_worker, of_batch, database):
    output = folder / "out"
    settings = SandboxSettings(mean=0.2, long_edge=16, slots=10, api_key=KEY)
    with running_sandbox(settings) as sandbox:
        environment = {
            "FLUX_KONTEXT_API_KEY": KEY,
            "FLUX_KONTEXT_BASE_URL": sandbox.url,
            "FLUX_KONTEXT_CONCURRENT_TASKS": "10",
            "FLUX_KONTEXT_POLL_INITIAL_DELAY": "0",
            "FLUX_KONTEXT_POLL_INTERVAL": "0.2",
            "PYTHONPATH": str(ROOT),
            "PREFECT_WORKER_QUERY_SECONDS": "1",
        }
        # A worker with a type creates its pool.
        with running_worker(
            "partitions", folder, of_worker.environment | environment, "--type", "process"
        ):
            done = subprocess.run(
                [sys.executable, "-c", PROGRAM, str(ROOT), str(output)],
                env=of_batch.environment | environment,
                capture_output=True,
                text=True,
                check=False,
            )
        assert done.returncode == 0, done.stderr[-3_000:]
        summary = json.loads(done.stdout.splitlines()[-1])
        states = asyncio.run(_count_states(database))
        bill = sandbox.service.bill()
    assert (summary["rows"], summary["stored"], summary["spent"]) == (40, 40, 1.2)
    assert bill["accepted"] == len(list(output.glob("*.jpg"))) == 40
    assert bill["peak_running"] <= 10
    assert states == {"COMPLETED": 3}


async def _count_states(database):
    """Return the number of flow runs in each state, from the database."""
    connection = await asyncpg.connect(database.replace("+asyncpg", ""))
    try:
        found = await connection.fetch("SELECT state_type, count(*) FROM flow_run GROUP BY 1")
    finally:
        await connection.close()
    return {row["state_type"]: row["count"] for row in found}
