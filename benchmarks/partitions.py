"""A batch in partitions over two workers, seen by the service: does it keep the account's limits?

    python benchmarks/partitions.py                 # 600 images, two partitions
    python benchmarks/partitions.py 1000 4 --kill   # and the second worker is killed
    python benchmarks/partitions.py 1000 2 --outage 120  # and the server is gone for two minutes

The sandbox's account has 40 slots and 600 requests a minute, tasks take 4 s. Prefect's server,
the workers and the partitions are processes of their own.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from prefect_records import SETTLES, counted

from prefect_flux_kontext.cli.prefect_server import prefect_server
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
SLOTS, A_MINUTE, SECONDS = 40, 600, 4
PATIENCE = 60.0
# In memory, as is Prefect's default, leases end when the server restarts, and with them flow runs.
LEASES = {
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": (
        "prefect.server.concurrency.lease_storage.filesystem"
    )
}
FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


@contextmanager
def worker(folder: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A worker, which is killed in the end."""
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "flux-kontext"]
    with (folder / "worker.log").open("ab") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def kill_second(api: str) -> None:
    """Kill the process of the second partition and the worker that started it."""
    runs = httpx.post(f"{api}/flow_runs/filter", json={}, timeout=PATIENCE).json()
    (run,) = [run for run in runs if "-partition-2-of-" in run["name"]]
    process = int(run["infrastructure_pid"].rpartition(":")[2])
    stat = Path(f"/proc/{process}/stat").read_text()
    for pid in (int(stat.rpartition(")")[2].split()[1]), process):
        os.kill(pid, signal.SIGKILL)


def measure(rows: int, partitions: int, folder: Path, *, kill: bool, outage: float) -> None:
    """One batch; prints what the service and Prefect have seen."""
    shutil.copytree(ROOT / "flows", folder / "flows")
    shutil.copy(ROOT / "prefect.yaml", folder)
    manifest = folder / "manifest.csv"
    manifest.write_text("id,prompt\n" + "".join(f"r{n},a lighthouse {n}\n" for n in range(rows)))
    service = SandboxSettings(
        mean=SECONDS, long_edge=16, slots=SLOTS, requests_per_minute=A_MINUTE
    )
    with ExitStack() as stack:
        sandbox = stack.enter_context(running_sandbox(service))
        serving = stack.enter_context(ExitStack())
        server = serving.enter_context(prefect_server(folder / "prefect", settings=LEASES))
        api = f"{server.url}/api"
        environment = server.environment | {
            "FLUX_KONTEXT_API_KEY": "sandbox",
            "FLUX_KONTEXT_BASE_URL": sandbox.url,
            "FLUX_KONTEXT_CONCURRENT_TASKS": str(SLOTS),
            "FLUX_KONTEXT_REQUESTS_PER_MINUTE": str(A_MINUTE),
            "FLUX_KONTEXT_POLL_INITIAL_DELAY": "3",
            "FLUX_KONTEXT_POLL_INTERVAL": "1",
            "INCOMING": str(manifest),
            "RESTYLED": str(folder / "out"),
            "PYTHONPATH": str(ROOT),
        }
        for command in (
            ["prefect", "work-pool", "create", "flux-kontext", "--type", "process"],
            ["prefect", "deploy", "--all"],
            ["prefect_flux_kontext", "limits", "create"],
        ):
            subprocess.run(
                [sys.executable, "-m", *command], cwd=folder, env=environment, check=True
            )
        for _ in range(2):
            stack.enter_context(worker(folder, environment))
        before = counted(api)
        name = f"{api}/deployments/name/style-transfer-batch/nightly-prefix"
        deployment = httpx.get(name, timeout=PATIENCE).json()["id"]
        parameters: dict[str, Any] = {"partitions": partitions, "budget_usd": None}
        run = httpx.post(
            f"{api}/deployments/{deployment}/create_flow_run",
            json={"parameters": parameters},
            timeout=PATIENCE,
        ).json()
        while run["state"]["type"] not in FINAL:
            time.sleep(1)
            run = httpx.get(f"{api}/flow_runs/{run['id']}", timeout=PATIENCE).json()
            if (kill or outage) and sandbox.service.bill()["accepted"] > rows / 4:
                if kill:
                    kill_second(api)
                if outage:
                    serving.close()
                    time.sleep(outage)
                    port = int(server.url.rpartition(":")[2])
                    serving.enter_context(prefect_server(folder / "prefect", port, LEASES))
                kill, outage = False, 0.0
        time.sleep(SETTLES)
        print(run["state"]["type"], f"{run['total_run_time']:.0f} s")
        print(f"limits: {SLOTS} tasks, {A_MINUTE} requests a minute")
        for what, number in sandbox.service.bill().items():
            print(f"{what}: {number}")
        print(f"images: {len(list((folder / 'out').glob('*.jpg')))}")
        for kind, number in counted(api).items():
            if number > before.get(kind, 0):
                print(f"{number - before.get(kind, 0):>6,}  {kind}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", nargs="?", type=int, default=600)
    parser.add_argument("partitions", nargs="?", type=int, default=2)
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--outage", type=float, default=0.0, metavar="SECONDS")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        measure(given.rows, given.partitions, Path(scratch), kill=given.kill, outage=given.outage)
