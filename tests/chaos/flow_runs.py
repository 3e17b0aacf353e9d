"""Batches as Prefect flow runs: with a time limit, cancelled, or in partitions, and killed."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx

from prefect_flux_kontext.cli.prefect_server import prefect_server
from tests.chaos.trials import finish

ROOT = Path(__file__).parents[2]
_POOL = "chaos"
_FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
_PATIENCE_SECONDS = 300


class FlowRuns:
    """A Prefect server, two workers, and deployments of the batch and its partitions."""

    def __init__(self, server, deployment):
        self.environment = server.environment
        self._deployment = deployment
        self._http = httpx.Client(base_url=server.environment["PREFECT_API_URL"], timeout=60)

    def start(self, batch, **parameters):
        """Start a flow run of a batch; return its id."""
        given = {"manifest": str(batch.manifest), "output": batch.output} | parameters
        path = f"/deployments/{self._deployment}/create_flow_run"

        def post():
            reply = self._http.post(path, json={"parameters": given})
            return None if reply.status_code == httpx.codes.SERVICE_UNAVAILABLE else reply

        reply = _wait_for(post)  # a busy server asks to be called again
        return reply.raise_for_status().json()["id"]

    def cancel(self, run_id):
        """Ask Prefect to cancel a flow run."""
        self._http.post(
            f"/flow_runs/{run_id}/set_state",
            json={"state": {"type": "CANCELLING", "name": "Cancelling"}},
        ).raise_for_status()

    def wait(self, run_id):
        """Wait until a flow run has ended; return the type of its state."""
        _wait_for(lambda: self.has_ended(run_id))
        return self._read(run_id)["state"]["type"]

    def has_ended(self, run_id):
        return self._read(run_id)["state"]["type"] in _FINAL

    def kill(self, name=""):
        """Kill the process of a running flow run whose name contains a text, if there is one."""
        runs = self._http.post("/flow_runs/filter", json={}).json()
        for run in runs:
            if run["state"]["type"] == "RUNNING" and name in run["name"]:
                pid = int((run["infrastructure_pid"] or ":0").rpartition(":")[2])
                if pid:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                        return True
        return False

    def kill_all(self):
        """Kill the processes of all running flow runs."""
        while self.kill():
            pass

    def _read(self, run_id):
        return self._http.get(f"/flow_runs/{run_id}").json()


def _wait_for(condition):
    end = time.monotonic() + _PATIENCE_SECONDS
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.2)
    return found


@contextlib.contextmanager
def _running_prefect(folder, environment):
    """Run a server and two workers with deployments, whose runs have the environment."""
    with prefect_server(folder / "prefect") as server, contextlib.ExitStack() as stack:
        workers = (
            server.environment
            | environment
            | {
                "PYTHONPATH": str(ROOT),
                "PREFECT_WORKER_QUERY_SECONDS": "1",
            }
        )
        _run_python(["prefect_flux_kontext", "limits", "create"], workers)
        deployment = _run_python(["tests.chaos.flow_runs"], workers).strip()
        for number in range(2):
            log = stack.enter_context((folder / f"worker-{number}.log").open("wb"))
            worker = subprocess.Popen(
                [sys.executable, "-m", "prefect", "worker", "start", "--pool", _POOL],
                env=workers,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            stack.callback(worker.wait)
            stack.callback(os.killpg, worker.pid, signal.SIGKILL)
        runs = FlowRuns(server, deployment)
        stack.callback(runs.kill_all)
        yield runs


def _run_python(command, environment):
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def _open_flow_runs(factory):
    """Return the scenario's Prefect, which starts with its first case."""
    if factory.flow_runs is None:
        # The workers' environment has the service and the cadence of the factory's batches.
        environment = factory.create_batch(1).environment
        factory.flow_runs = factory.stack.enter_context(
            _running_prefect(factory.folder, environment)
        )
    return factory.flow_runs


def limit_time(factory, line, rng, _number, *, runs=3):
    """Run a batch as a flow whose time limit ends it, some times."""
    prefect = _open_flow_runs(factory)
    batch = factory.create_batch(200, **prefect.environment)
    for _ in range(runs):
        batch.start("flow", batch.manifest, batch.output, f"{rng.uniform(1.5, 4):.2f}").end()
        batch.kills += 1
    line.forbid_unknown(finish(line, batch, runs))


def cancel_flow_run(factory, line, rng, _number, *, runs=2):
    """Cancel the flow runs of a batch in Prefect, which sends their processes a signal."""
    prefect = _open_flow_runs(factory)
    batch = factory.create_batch(300)
    for _ in range(runs):
        run_id = prefect.start(batch)
        wanted = batch.accepted + rng.randrange(1, 80)
        _wait_for(lambda wanted=wanted: batch.accepted >= wanted)
        prefect.cancel(run_id)
        batch.kills += prefect.wait(run_id) == "CANCELLED"
    line.forbid_unknown(finish(line, batch, runs))


def kill_partitions(factory, line, rng, _number, *, kills=2):
    """Kill processes of a batch in two partitions: a partition, or the flow run that leads it."""
    prefect = _open_flow_runs(factory)
    batch = factory.create_batch(300)
    options = {"partition_deployment": f"{_PARTITION}/{_POOL}"}
    run_id = prefect.start(batch, partitions=2, advanced=options)
    for _ in range(kills):
        wanted = batch.accepted + rng.randrange(1, 60)
        _wait_for(lambda wanted=wanted: batch.accepted >= wanted or prefect.has_ended(run_id))
        batch.kills += prefect.kill(rng.choice(("partition-1", "partition-2", "")))
    prefect.wait(run_id)
    assert batch.accepted, "the flow run submitted nothing"
    prefect.kill_all()
    finish(line, batch, kills)


_PARTITION = "style-transfer-partition"


async def _deploy():
    """Create the work pool and the deployments, and print the id of the batch's deployment."""
    from prefect import get_client  # noqa: PLC0415 - the other processes do not need it
    from prefect.client.schemas.actions import WorkPoolCreate  # noqa: PLC0415
    from prefect.workers.process import ProcessWorker  # noqa: PLC0415

    from prefect_flux_kontext.flows import style_transfer_batch  # noqa: PLC0415
    from prefect_flux_kontext.orchestration.partitions.flow import (  # noqa: PLC0415
        style_transfer_partition,
    )

    async with get_client() as client:
        template = ProcessWorker.get_default_base_job_template()
        await client.create_work_pool(
            WorkPoolCreate(name=_POOL, type="process", base_job_template=template)
        )
        for flow, entrypoint in (
            (style_transfer_batch, "prefect_flux_kontext.deployments.manifest_lands"),
            (
                style_transfer_partition,
                "prefect_flux_kontext.deployments.partition_of_batch",
            ),
        ):
            deployment = await client.create_deployment(
                flow_id=await client.create_flow(flow),
                name=_POOL,
                entrypoint=entrypoint,
                work_pool_name=_POOL,
                pull_steps=[],
            )
            if flow is style_transfer_batch:
                sys.stdout.write(f"{deployment}\n")


if __name__ == "__main__":
    asyncio.run(_deploy())
