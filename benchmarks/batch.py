"""A batch through the sandbox and a real Prefect server: images a second, task runs, memory.

    python benchmarks/batch.py --rows 1000 --mean 2

Everything runs on this machine: the sandbox and the server in processes of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx

from prefect_flux_kontext.cli.prefect_server import prefect_server

STYLES = ("watercolour", "pencil sketch", "oil painting", "poster")


def main() -> None:
    """Run one batch and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--mean", type=float, default=2.0, help="seconds a generation takes")
    parser.add_argument("--slots", type=int, default=1000)
    parser.add_argument("--requests-per-minute", type=int, default=10_000)
    parser.add_argument("--long-edge", type=int, default=512, help="pixels")
    parser.add_argument("--flow", nargs=2, metavar=("MANIFEST", "OUTPUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.flow:
        asyncio.run(run_flow(*options.flow))
    else:
        with tempfile.TemporaryDirectory() as folder:
            measure(options, Path(folder))


def measure(options: argparse.Namespace, folder: Path) -> None:
    """Start what is needed, run the batch as a flow in its own process, print the figures."""
    sandbox = subprocess.Popen(
        [
            *(sys.executable, "-m", "prefect_flux_kontext", "sandbox", "--port", "0"),
            *("--mean", str(options.mean), "--slots", str(options.slots)),
            *("--requests-per-minute", str(options.requests_per_minute)),
            *("--long-edge", str(options.long_edge)),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        url = sandbox.stdout.readline().split()[-1]
        manifest = folder / "manifest.csv"
        write_manifest(manifest, url, options.rows)
        with prefect_server(folder / "prefect") as server:
            environment = {
                **os.environ,
                **server.environment,
                "FLUX_KONTEXT_BASE_URL": url,
                "FLUX_KONTEXT_API_KEY": "sandbox",
                "FLUX_KONTEXT_CONCURRENT_TASKS": str(options.slots),
                "FLUX_KONTEXT_REQUESTS_PER_MINUTE": str(options.requests_per_minute),
                "FLUX_KONTEXT_POLL_INITIAL_DELAY": str(options.mean * 0.75),
                "FLUX_KONTEXT_POLL_INTERVAL": str(options.mean * 0.25),
                "PREFECT_LOGGING_LEVEL": "WARNING",
            }
            flow = subprocess.run(
                [sys.executable, __file__, "--flow", str(manifest), str(folder / "out")],
                env=environment,
                stdout=subprocess.PIPE,
                check=True,
            )
            report = json.loads(flow.stdout)
            recorded = httpx.post(
                f"{server.url}/api/task_runs/count",
                json={"task_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}},
            ).json()
        bill = httpx.get(f"{url}/sandbox/bill").json()
    finally:
        sandbox.terminate()
        sandbox.wait()
    waves = -(-options.rows // 250)
    print(report["summary"])
    print(f"images a second       {report['stored'] / report['seconds']:.1f}")
    print(f"task runs             {waves} made, {recorded} recorded as completed")
    print(f"peak memory           {report['peak_mb']:.0f} MB in the flow's process")
    print(f"CPU of the flow       {report['cpu_seconds']:.1f} s")
    print(f"requests for an image {1 + bill['status_requests'] / options.rows:.2f}")
    print(f"peak running tasks    {bill['peak_running']} of {options.slots}")
    peak = bill["peak_requests_a_minute"]
    print(f"peak requests/minute  {peak} of {options.requests_per_minute}")
    print(f"refused (429)         {bill['submits_refused']}, statuses {bill['statuses_refused']}")
    print(f"paid                  {bill['accepted']} tasks, ${bill['dollars']}")


def write_manifest(path: Path, url: str, rows: int) -> None:
    """Rows with prompts of their own, so that none equals another."""
    names = [entry["name"] for entry in httpx.get(f"{url}/references").json()]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "image", "prompt"])
        for number in range(rows):
            image = f"{url}/references/{names[number % len(names)]}"
            prompt = f"{STYLES[number % len(STYLES)]}, take {number}"
            writer.writerow([f"row-{number:06}", image, prompt])


async def run_flow(manifest: str, output: str) -> None:
    """Run the batch and print its figures as JSON."""
    from prefect_flux_kontext.flows import style_transfer_batch  # noqa: PLC0415 - heavy

    summary = await style_transfer_batch(manifest, output)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    figures = {
        "summary": str(summary),
        "stored": summary.stored,
        "seconds": summary.seconds,
        "peak_mb": usage.ru_maxrss / 1024,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
