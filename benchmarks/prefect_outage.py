"""The Prefect server is gone in the middle of a batch: what is saved, what is paid twice.

    python benchmarks/prefect_outage.py 30

A batch of 1,000 rows runs as a flow for about 80 s; after 20 s its server is stopped, and after
the given seconds it is back on the same port with the same database. Then the batch is run again.
"""

from __future__ import annotations

import asyncio
import csv
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from prefect_flux_kontext.cli.prefect_server import prefect_server
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings

ROWS = 1_000
SLOTS = 100
BEFORE = 20.0


async def run_flow(manifest: str, output: str) -> None:
    """Run the batch and print its summary as JSON."""
    from prefect_flux_kontext.flows import style_transfer_batch  # noqa: PLC0415 - heavy

    summary = await style_transfer_batch(manifest, output)
    print(summary.model_dump_json(include={"stored", "rows", "spent"}))


def flow(manifest: Path, output: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    """Start the batch as a flow in a process of its own."""
    command = [sys.executable, __file__, "--flow", str(manifest), str(output)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def stored_by_second(output: Path, began: float) -> list[int]:
    """How many images were in place at the end of each second."""
    seconds = [int(path.stat().st_mtime - began) for path in output.glob("*.jpg")]
    return [sum(at <= second for at in seconds) for second in range(max(seconds) + 1)]


def measure(outage: float, folder: Path) -> None:
    """One outage; print how the batch ended and what running it again did."""
    output, manifest = folder / "out", folder / "manifest.csv"
    with running_sandbox(SandboxSettings(mean=8, slots=SLOTS, long_edge=64)) as sandbox:
        with manifest.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "image", "prompt"])
            image = f"{sandbox.url}/references/cat.png"
            writer.writerows([f"row-{n}", image, f"oil, take {n}"] for n in range(ROWS))
        account = {
            "FLUX_KONTEXT_BASE_URL": sandbox.url,
            "FLUX_KONTEXT_API_KEY": "sandbox",
            "FLUX_KONTEXT_CONCURRENT_TASKS": str(SLOTS),
            "FLUX_KONTEXT_POLL_INITIAL_DELAY": "6",
            "FLUX_KONTEXT_POLL_INTERVAL": "1",
            "PREFECT_LOGGING_LEVEL": "ERROR",
        }
        with prefect_server(folder / "prefect") as server:
            port = int(server.url.rpartition(":")[2])
            environment = {**os.environ, **server.environment, **account}
            began = time.time()
            batch = flow(manifest, output, environment)
            time.sleep(BEFORE)
        time.sleep(outage)
        with prefect_server(folder / "prefect", port):
            batch.communicate()
            ended = time.time() - began
            paid = sandbox.service.bill()["accepted"]
            images = len(list(output.glob("*.jpg")))
            saved = stored_by_second(output, began)
            longest = max(later - earlier for earlier, later in pauses(saved))
            print(
                f"outage of {outage:g} s: flow ended with {batch.returncode} after {ended:.0f} s;"
            )
            print(f"  {paid} rows paid, {images} images saved, longest pause {longest} s")
            again = flow(manifest, output, environment)
            figures = json.loads(again.communicate()[0])
            twice = sandbox.service.bill()["accepted"] - ROWS
            print(
                f"  run again: {figures['stored']} of {figures['rows']} stored, {twice} paid twice"
            )


def pauses(saved: list[int]) -> list[tuple[int, int]]:
    """Seconds between which nothing was stored."""
    moves = [second for second in range(1, len(saved)) if saved[second] > saved[second - 1]]
    return list(itertools.pairwise(moves)) or [(0, 0)]


if __name__ == "__main__":
    if sys.argv[1] == "--flow":
        asyncio.run(run_flow(*sys.argv[2:]))
    else:
        with tempfile.TemporaryDirectory() as place:
            measure(float(sys.argv[1]), Path(place))
