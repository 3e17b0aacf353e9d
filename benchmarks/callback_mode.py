"""The same batch polled and called back: requests for an image, images a second.

    python benchmarks/callback_mode.py --rows 500 --mean 6

The sandbox is a process of its own; batch and receiver share another.
"""

from __future__ import annotations

import argparse
import csv
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx

PROGRAM = (sys.executable, "-m", "prefect_flux_kontext")


def main() -> None:
    """Run the batch in each mode and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--mean", type=float, default=6.0, help="seconds a generation takes")
    parser.add_argument("--slots", type=int, default=50)
    parser.add_argument("--requests-per-minute", type=int, default=10_000)
    options = parser.parse_args()
    limits = ("--slots", str(options.slots), "--mean", str(options.mean))
    limits += ("--requests-per-minute", str(options.requests_per_minute), "--long-edge", "64")
    sandbox = subprocess.Popen(
        [*PROGRAM, "sandbox", "--port", "0", *limits], stdout=subprocess.PIPE, text=True
    )
    try:
        url = sandbox.stdout.readline().split()[-1]
        with tempfile.TemporaryDirectory() as folder:
            for mode in ("polled", "called back", "called back in vain"):
                run(mode, url, Path(folder) / mode, options)
    finally:
        sandbox.terminate()
        sandbox.communicate()


def run(mode: str, url: str, folder: Path, options: argparse.Namespace) -> None:
    """Run the batch once and print a line."""
    folder.mkdir()
    with (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "prompt"])
        writer.writerows([f"r{n}", f"take {n}"] for n in range(options.rows))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {
        **os.environ,
        "FLUX_KONTEXT_BASE_URL": url,
        "FLUX_KONTEXT_API_KEY": mode.replace(" ", "-"),
        "FLUX_KONTEXT_CONCURRENT_TASKS": str(options.slots),
        "FLUX_KONTEXT_REQUESTS_PER_MINUTE": str(options.requests_per_minute),
        # The service's advice for 30 s, and a sweep of 60, in proportion.
        "FLUX_KONTEXT_POLL_INITIAL_DELAY": str(options.mean * 20 / 30),
        "FLUX_KONTEXT_POLL_INTERVAL": str(options.mean * 3 / 30),
        "FLUX_KONTEXT_CALLBACK_SWEEP": str(options.mean * 60 / 30),
        "FLUX_KONTEXT_CALLBACK_SECRET": "the-secret-of-the-benchmark-0123",
    }
    if mode != "polled":
        environment["FLUX_KONTEXT_CALLBACK_URL"] = f"http://{address}/hooks"
    if mode == "called back":
        environment["FLUX_KONTEXT_CALLBACK_LISTEN"] = address
    before = httpx.get(f"{url}/sandbox/bill").json()
    command = [*PROGRAM, "run", str(folder / "manifest.csv"), str(folder / "out")]
    ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    after = httpx.get(f"{url}/sandbox/bill").json()
    looks = (after["status_requests"] - before["status_requests"]) / options.rows
    paid = after["accepted"] - before["accepted"]
    last = ended.stdout.splitlines()[-2]
    print(f"{mode:20} {1 + looks:.2f} requests an image, {paid} paid; {last}", flush=True)


if __name__ == "__main__":
    main()
