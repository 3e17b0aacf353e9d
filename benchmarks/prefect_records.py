"""How many task runs, events, logs and artifacts a batch leaves in Prefect's database.

    python benchmarks/prefect_records.py 1000

Runs a batch of a number of rows as a flow against a server of its own, and counts what is there.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx

from prefect_flux_kontext.cli.prefect_server import prefect_server
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings

SETTLES = 15.0


async def run_flow(rows: int, output: str) -> None:
    """Run the batch."""
    from prefect_flux_kontext.flows import style_transfer_batch  # noqa: PLC0415 - heavy

    manifest = [{"id": f"row-{n}", "prompt": f"a lighthouse, take {n}"} for n in range(rows)]
    await style_transfer_batch(manifest, output)


def counted(api: str) -> dict[str, int]:
    """What the server has, by kind."""
    names: Counter[str] = Counter()
    page = httpx.post(f"{api}/events/filter", json={"limit": 50}).json()
    while True:
        names.update(event["event"] for event in page["events"])
        if not page["next_page"]:
            break
        page = httpx.get(page["next_page"]).json()
    events = dict(sorted(names.items()))
    counts = {
        kind: httpx.post(f"{api}/{kind}/count", json={}).json()
        for kind in ("flow_runs", "task_runs", "artifacts")
    }
    logs = len(httpx.post(f"{api}/logs/filter", json={"limit": 200}).json())
    return {**counts, "logs": logs, "events": sum(names.values()), **events}


def measure(rows: int, folder: Path) -> None:
    """One batch; prints what it has left."""
    with (
        running_sandbox(SandboxSettings(mean=5, long_edge=16)) as sandbox,
        prefect_server(folder / "prefect") as server,
    ):
        account = {"FLUX_KONTEXT_API_KEY": "sandbox", "FLUX_KONTEXT_BASE_URL": sandbox.url}
        environment = {**os.environ, **server.environment, **account}
        command = [sys.executable, __file__, "--flow", str(rows), str(folder / "out")]
        subprocess.run(command, env=environment, check=True)
        time.sleep(SETTLES)
        for kind, number in counted(f"{server.url}/api").items():
            print(f"{number:>6,}  {kind}")


if __name__ == "__main__":
    if sys.argv[1] == "--flow":
        asyncio.run(run_flow(int(sys.argv[2]), sys.argv[3]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            measure(int(sys.argv[1]), Path(scratch))
