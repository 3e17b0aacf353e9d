"""Workers for deployed flow runs, and the states of these runs."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import anyio
from prefect import get_client


@contextmanager
def running_worker(pool, folder, environment, *options):
    """Run a worker of a pool in a folder while the block runs; it logs to `worker.log`."""
    with (folder / "worker.log").open("ab") as log:
        worker = subprocess.Popen(
            [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, *options],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield worker
        finally:
            worker.send_signal(signal.SIGTERM)
            try:
                worker.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()


async def wait_for_state(run_id, *names):
    """Wait until a flow run is in a state of one of the names, and return the run."""
    async with get_client() as client:
        for _ in range(1_800):
            run = await client.read_flow_run(run_id)
            if run.state_name in names:
                return run
            assert not run.state.is_final(), f"{run.state_name}: {run.state.message}"
            await anyio.sleep(0.1)
    raise AssertionError(f"still {run.state_name}")


async def read_state_names(run_id):
    async with get_client() as client:
        return [state.name for state in await client.read_flow_run_states(run_id)]
