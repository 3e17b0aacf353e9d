"""Workers that run the partitions of batches, and the flow runs that they run."""

import asyncio
from collections import Counter
from pathlib import Path

import anyio
from prefect import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName
from prefect.workers.process import ProcessWorker

from prefect_flux_kontext.orchestration.partitions.flow import style_transfer_partition
from tests.orchestration.deployed import running_worker

ROOT = Path(__file__).parents[2]


async def deploy(name, *, pool):
    async with get_client() as client:
        template = ProcessWorker.get_default_base_job_template()
        await client.create_work_pool(
            WorkPoolCreate(name=pool, type="process", base_job_template=template)
        )
    flow = await style_transfer_partition.from_source(
        str(ROOT), "flows/partition_of_batch.py:partition_of_batch"
    )
    await flow.deploy(name, work_pool_name=pool, print_next_steps=False)


class PartitionWorkers:
    """Workers that run one partition at a time each, and the sandbox."""

    def __init__(self, folder, environment, sandbox, stack):
        self.sandbox = sandbox
        self.processes = {}
        self._start = lambda: stack.enter_context(
            running_worker("partitions", folder, environment, "--limit", "1")
        )

    def start_worker(self):
        worker = self._start()
        self.processes[worker.pid] = worker

    def count_paid(self, *, text=""):
        """Return how often each prompt that contains a text was paid for."""
        tasks = self.sandbox.service.records()
        prompts = (task["prompt"] for task in tasks)
        return Counter(prompt for prompt in prompts if text in prompt)


async def find_runs(text):
    """Return the flow runs whose name contains a text."""
    async with get_client() as client:
        named = FlowRunFilter(name=FlowRunFilterName(like_=text))
        return await client.read_flow_runs(flow_run_filter=named, limit=50)


async def wait_until(condition):
    async with asyncio.timeout(300):
        while not condition():  # noqa: ASYNC110 - another process makes it true
            await anyio.sleep(0.05)


async def find_process(text):
    """Return the flow run whose name contains a text, and the id of its process."""
    async with asyncio.timeout(300):
        while True:
            (run,) = await find_runs(text)
            if run.infrastructure_pid:
                return run, int(run.infrastructure_pid.rpartition(":")[2])
            await anyio.sleep(0.05)


def read_parent(process):
    stat = Path(f"/proc/{process}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[1])
