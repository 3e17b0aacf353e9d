"""Everything that docs/performance.md tells, measured side by side: `make bench`.

    python benchmarks/run.py --quick                # all of it in two minutes, to try it out
    python benchmarks/run.py --only limits start    # parts
    python benchmarks/run.py --page docs/performance.md

Sandbox and Prefect server run in processes of their own, and so does each piece of work. Each
figure is the median of several runs.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from chart import bars, table, write_between_markers

from prefect_flux_kontext.cli.prefect_server import prefect_server

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

WORK = Path(__file__).with_name("work.py")
UNLIMITED = 1_000_000


@dataclass(frozen=True)
class Account:
    """The sandbox's settings and the cadence that goes with them."""

    mean: float = 30.0
    slots: int = 1_000
    requests: int = 10_000
    long_edge: int = 96

    @property
    def environment(self) -> dict[str, str]:
        """The account for the work's process."""
        return {
            "FLUX_KONTEXT_API_KEY": "sandbox",
            "FLUX_KONTEXT_CONCURRENT_TASKS": str(self.slots),
            "FLUX_KONTEXT_REQUESTS_PER_MINUTE": str(self.requests),
            "FLUX_KONTEXT_POLL_INITIAL_DELAY": str(self.mean * 2 / 3),
            "FLUX_KONTEXT_POLL_INTERVAL": str(max(0.01, self.mean / 10)),
            "PREFECT_LOGGING_LEVEL": "ERROR",
        }


@contextmanager
def sandbox(account: Account) -> Iterator[str]:
    """A sandbox in a process of its own; yields its URL."""
    command = [
        *(sys.executable, "-m", "prefect_flux_kontext", "sandbox", "--port", "0"),
        *("--mean", str(account.mean), "--slots", str(account.slots)),
        *("--requests-per-minute", str(account.requests)),
        *("--long-edge", str(account.long_edge), "--balance", "1000000"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
    finally:
        process.terminate()
        process.wait()


def work(
    name: str, account: Account, images: int, *, kind: str = "jpeg", prefect: bool = False
) -> dict[str, float]:
    """One run of a piece of work against a new sandbox; returns all figures."""
    with tempfile.TemporaryDirectory() as place, sandbox(account) as url:
        folder = Path(place)
        with (folder / "manifest.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "image", "prompt", "output_format"])
            image = f"{url}/references/cat.png"  # one reference and style: painted once
            rows = ([f"row-{n:06}", image, f"oil, take {n}", kind] for n in range(images))
            writer.writerows(rows)
        environment = {**os.environ, **account.environment, "FLUX_KONTEXT_BASE_URL": url}
        command = [sys.executable, str(WORK), name, str(folder)]
        told: dict[str, float]
        if prefect:
            with prefect_server(folder / "prefect") as server:
                done = run(command, {**environment, **server.environment})
                told = json.loads(done) | recorded(server.url)
        else:
            told = json.loads(run(command, environment))
        if told["stored"] != images:
            raise SystemExit(f"{name}: {told['stored']} of {images} images were stored")
        told["files"] = sum(path.is_file() for path in folder.glob("out/_ledger/**/*"))
        return told | seen_by_the_service(url, account, images)


def run(command: Sequence[str], environment: dict[str, str]) -> str:
    """The last line that a process prints."""
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()[-1]


def recorded(url: str) -> dict[str, float]:
    """Task runs and events that the Prefect server has recorded."""
    time.sleep(5)  # the last events are under way
    with httpx.Client(base_url=f"{url}/api", timeout=60) as http:
        runs = http.post("/task_runs/count", json={}).json()
        events = http.post("/events/filter", json={"limit": 1}).json()["total"]
    return {"task_runs": runs, "events": events}


def seen_by_the_service(url: str, account: Account, images: int) -> dict[str, float]:
    """What the sandbox's bill says, and how fast tasks were accepted after the ramp-up."""
    bill = httpx.get(f"{url}/sandbox/bill").json()
    lines = httpx.get(f"{url}/sandbox/tasks", timeout=60).text.splitlines()
    accepted = sorted(json.loads(line)["accepted_at"] / 1000 for line in lines)
    first = accepted[min(2 * account.slots, images // 2)]
    submits = images + sum(bill["submits_refused"].values())
    requests = submits + bill["status_requests"]
    refused = sum(bill["submits_refused"].values()) + bill["statuses_refused"]
    return {
        "rate": sum(first < at for at in accepted) / max(0.001, accepted[-1] - first),
        "requests": requests / images,
        "refused": refused / requests,
    }


def medians(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of each figure."""
    return {name: statistics.median(told[name] for told in runs) for name in runs[0]}


@dataclass(frozen=True)
class Bench:
    """How much is measured, and where plots go."""

    quick: bool
    repeats: int
    plots: Path

    def median(self, *args: Any, **how: Any) -> dict[str, float]:
        """The medians of several runs of a piece of work."""
        told = medians([work(*args, **how) for _ in range(self.repeats)])
        print(args[0], {name: round(value, 3) for name, value in told.items()}, file=sys.stderr)
        return told

    def limits(self) -> str:
        """At the account's real limits, beside the fixed cadences of the known SDKs."""
        account = Account(mean=2, slots=100, requests=15_000) if self.quick else Account()
        images = 600 if self.quick else 4_000
        limit, pace = account.slots / account.mean, account.mean / 30
        works = {"this package": "batch"} | {
            f"fixed, every {seconds:g} s": f"fixed:{seconds * pace}" for seconds in (0.5, 1, 5, 10)
        }
        told = {label: self.median(name, account, images) for label, name in works.items()}
        values = [(label, one["rate"]) for label, one in told.items()]
        plot = bars("Images a second at the account's limits", "/s", values, limit=limit)
        (self.plots / "limits.svg").write_text(plot)
        columns = [
            *("", "images/s", "of the limit", "requests/image", "refused"),
            *("unnoticed p50", "p95", "CPU s per 1,000"),
        ]
        rows = [
            [
                label,
                f"{one['rate']:.1f}",
                f"{one['rate'] / limit:.1%}",
                f"{one['requests']:.2f}",
                f"{one['refused']:.3%}",
                f"{one['unnoticed_p50']:.1f} s",
                f"{one['unnoticed_p95']:.1f} s",
                f"{one['cpu'] / images * 1000:.1f}",
            ]
            for label, one in told.items()
        ]
        what = f"{images:,} images of {account.mean:g} s, {account.slots:,} slots"
        return f"{what}, {account.requests:,} requests a minute.\n\n{table(columns, rows)}"

    def ceiling(self) -> str:
        """How fast the client is itself, with the service out of the way."""
        parts = []
        for label, kind, edge, images in (
            ("96 px JPEG", "jpeg", 96, 300 if self.quick else 3_000),
            ("1 MB PNG", "png", 1_024, 50 if self.quick else 500),
        ):
            account = Account(mean=0.02, slots=UNLIMITED, requests=UNLIMITED, long_edge=edge)
            few = 30 if self.quick else 300
            told = {
                "this package": (self.median("batch", account, images, kind=kind), images),
                "asyncio and httpx alone": (
                    self.median("bare", account, images, kind=kind),
                    images,
                ),
                "Prefect, `.map` of three tasks": (
                    self.median("mapped", account, few, kind=kind, prefect=True),
                    few,
                ),
            }
            speeds = [(name, n / one["seconds"]) for name, (one, n) in told.items()]
            plot = bars(f"The client's own ceiling, {label}: images a second", "/s", speeds)
            (self.plots / f"ceiling-{kind}.svg").write_text(plot)
            rows = [
                [
                    name,
                    f"{n:,}",
                    f"{n / one['seconds']:.1f}",
                    f"{one['cpu'] / n * 1000:.1f}",
                    f"{one['peak_mb']:.0f}",
                ]
                for name, (one, n) in told.items()
            ]
            columns = [label, "images", "images/s", "CPU s per 1,000", "peak MB"]
            parts.append(table(columns, rows))
        return "\n\n".join(parts)

    def growth(self) -> str:
        """What more rows cost, as a flow: time, memory, ledger, Prefect's records."""
        account = Account(mean=0.02, slots=UNLIMITED, requests=UNLIMITED)
        sizes = (250, 1_000) if self.quick else (1_000, 10_000, 100_000)
        rows = []
        for images in sizes:
            one = self.median("flow", account, images, prefect=True)
            rows.append(
                [
                    f"{images:,}",
                    f"{one['seconds']:.1f} s",
                    f"{one['seconds'] / images * 1000:.2f} ms",
                    f"{one['cpu'] / images * 1000:.2f} ms",
                    f"{one['peak_mb']:.0f} MB",
                    f"{one['files'] / images:.3f}",
                    f"{one['task_runs']:g}",
                    f"{one['events'] / images:.3f}",
                ]
            )
        columns = "rows, time, an image, CPU an image, peak memory, ledger objects an image"
        return table([*columns.split(", "), "task runs", "events an image"], rows)

    def start(self) -> str:
        """Seconds until something has started."""
        commands = {
            "`python -c pass`": ["-c", "pass"],
            "`import prefect_flux_kontext`": ["-c", "import prefect_flux_kontext"],
            "`flux-kontext --help`": ["-m", "prefect_flux_kontext", "--help"],
            "`import prefect_flux_kontext.flows`": ["-c", "import prefect_flux_kontext.flows"],
            "`import prefect`": ["-c", "import prefect"],
        }
        rows = []
        for label, arguments in commands.items():
            times = []
            for _ in range(max(3, self.repeats)):
                began = time.perf_counter()
                subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
                times.append(time.perf_counter() - began)
            rows.append([label, f"{statistics.median(times):.2f} s"])
        return table(["", "time"], rows)


def main() -> None:
    """Measure, print the tables, and write them into the page."""
    parts = ["limits", "ceiling", "growth", "start"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, one run of each")
    parser.add_argument("--repeats", type=int, help="runs of each (3, with --quick 1)")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--page", type=Path, help="write tables and plots into this page")
    options = parser.parse_args()
    page: Path | None = options.page
    with tempfile.TemporaryDirectory() as place:
        plots = page.with_name("performance") if page else Path(place)
        plots.mkdir(exist_ok=True)
        repeats = options.repeats or (1 if options.quick else 3)
        bench = Bench(options.quick, repeats, plots)
        machine = (
            f"{os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"
        )
        for part in options.only:
            text = f"{getattr(bench, part)()}\n\nMedians of {repeats}; {machine}."
            text += "".join(
                f"\n\n![{plot.stem}]({plots.name}/{plot.name})"
                for plot in sorted(plots.glob(f"{part}*.svg"))
            )
            print(f"## {part}\n\n{text}\n", flush=True)
            if page:
                write_between_markers(page, part, text)


if __name__ == "__main__":
    main()
