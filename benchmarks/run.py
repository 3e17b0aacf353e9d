"""Everything that docs/performance.md tells, measured side by side: `make bench`.

    python benchmarks/run.py --quick                # all of it in a few minutes, to try it out
    python benchmarks/run.py --only limits start    # parts
    python benchmarks/run.py --page docs/performance.md

Sandbox and Prefect server run in processes of their own, and so does each piece of work. Each
figure is the median of several runs, unless it says otherwise.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from chart import bars, table, write_between_markers
from measuring import UNLIMITED, Account, Runs

CEILING = (("96 px JPEG", "jpeg", 96, 4_000, 1_000), ("1 MB PNG", "png", 1_024, 2_000, 200))
"""What the images are called; their format and long edge; how many, and how many for what is
slow, or if quick."""


@dataclass(frozen=True)
class Bench:
    """How much is measured, and where plots go."""

    quick: bool
    runs: Runs
    plots: Path

    def limits(self) -> str:
        """At the account's real limits, beside the fixed cadences of the known SDKs."""
        account = Account(mean=2, slots=100, requests=15_000) if self.quick else Account()
        images = 600 if self.quick else 4_000
        limit, pace = account.slots / account.mean, account.mean / 30
        works = {
            "this package, polling": ("batch", 1_000),
            "this package, called back": ("called", 1_000),
        } | {
            f"fixed, every {seconds:g} s": (f"fixed:{seconds * pace:g}", 1)
            for seconds in (0.5, 1, 5, 10)
        }
        figures = {
            label: self.runs.medians(name, account, images, most=most)
            for label, (name, most) in works.items()
        }
        values = [(label, limit * one["slots_used"]) for label, one in figures.items()]
        plot = bars("Images a second at the account's limits", "/s", values, limit=limit)
        (self.plots / "limits.svg").write_text(plot)
        columns = [
            *("", "runs", "images/s", "slots used", "requests/image", "submits refused"),
            *("requests refused", "most in a minute", "unnoticed p50", "p95", "CPU s per 1,000"),
        ]
        rows = [
            [
                label,
                f"{one['runs']}",
                f"{limit * one['slots_used']:.1f}",
                f"{one['slots_used']:.1%}",
                f"{one['requests']:.2f}",
                f"{one['submits_refused']:.3%}",
                f"{one['refused']:.3%}",
                f"{one['peak_a_minute']:,.0f}",
                f"{one['unnoticed_p50']:.1f} s",
                f"{one['unnoticed_p95']:.1f} s",
                f"{one['cpu'] / images * 1000:.1f}",
            ]
            for label, one in figures.items()
        ]
        what = f"{images:,} images of {account.mean:g} s, {account.slots:,} slots"
        return f"{what}, {account.requests:,} requests a minute.\n\n{table(columns, rows)}"

    def ceiling(self) -> str:
        """How fast the client is itself, with the service out of the way."""
        parts = []
        for label, kind, edge, many, few in CEILING:
            images = few if self.quick else many
            account = Account(mean=0.02, requests=UNLIMITED, long_edge=edge)
            bare = Account(mean=0.02, requests=UNLIMITED, long_edge=edge, gallery=0)
            works = {
                "this package": ("batch", account, images),
                "this package, no gallery": ("batch", bare, images),
                "asyncio and httpx, 64 pools of one": ("bare", bare, images),
                "asyncio and httpx, one client": ("one-client", bare, few),
                "Prefect, `.map` of three tasks": ("mapped", bare, 30 if self.quick else few),
            }
            figures = {
                name: (self.runs.medians(*how, kind=kind), how[2]) for name, how in works.items()
            }
            speeds = [(name, n / one["seconds"]) for name, (one, n) in figures.items()]
            plot = bars(f"The client's own ceiling, {label}: images a second", "/s", speeds)
            (self.plots / f"ceiling-{kind}.svg").write_text(plot)
            rows = [
                [
                    name,
                    f"{n:,}",
                    f"{one['runs']}",
                    f"{n / one['seconds']:.1f}",
                    f"{one['requests']:.2f}",
                    f"{one['cpu'] / n * 1000:.1f}",
                    f"{one['peak_mb']:.0f}",
                ]
                for name, (one, n) in figures.items()
            ]
            columns = [label, "images", "runs", "images/s", "requests/image"]
            parts.append(table([*columns, "CPU s per 1,000", "peak MB"], rows))
        return "\n\n".join(parts)

    def growth(self) -> str:
        """What more rows cost, as a flow: time, memory, ledger, Prefect's records."""
        account = Account(mean=0.02, requests=UNLIMITED)
        sizes = {250: 1, 1_000: 1} if self.quick else {1_000: 1_000, 10_000: 1, 100_000: 1}
        figures = {
            images: self.runs.medians("flow", account, images, most=most)
            for images, most in ({1: 1_000} | sizes).items()
        }
        first = figures[1]
        rows, peaks = [], []
        for images, one in figures.items():
            more = {
                name: f"{(one[name] - first[name]) / (images - 1) * 1000:.2f} ms"
                for name in ("seconds", "cpu")
                if images > 1
            }
            peaks.append((f"{images:,} images", one["peak_mb"]))
            rows.append(
                [
                    f"{images:,}",
                    f"{one['runs']}",
                    f"{one['seconds']:.1f} s",
                    more.get("seconds", ""),
                    f"{one['cpu']:.1f} s",
                    more.get("cpu", ""),
                    f"{one['peak_mb']:.0f} MB",
                    f"{one['end_seconds']:.1f} s",
                    f"{one['end_mb']:.0f} MB",
                    f"{one['files'] / images:.3f}",
                    f"{one['task_runs']:g}",
                    f"{one['events'] / images:.3f}",
                ]
            )
        columns = (
            "rows, runs, time, a further image, CPU time, a further image, peak memory, "
            "its end phase, memory for that, ledger objects an image, task runs, events an image"
        )
        plot = bars("Peak memory of a batch as a flow", " MB", peaks)
        (self.plots / "growth.svg").write_text(plot)
        return table(columns.split(", "), rows)

    def start(self) -> str:
        """Seconds until something has started."""
        commands = {
            "`python -c pass`": ["-c", "pass"],
            "`import prefect_flux_kontext`": ["-c", "import prefect_flux_kontext"],
            "`flux-kontext --help`": ["-m", "prefect_flux_kontext", "--help"],
            "`import prefect_flux_kontext.flows`": ["-c", "import prefect_flux_kontext.flows"],
            "`import prefect`": ["-c", "import prefect"],
        }
        repeats = 1 if self.quick else 5
        rows = []
        for label, arguments in commands.items():
            times = []
            for _ in range(repeats):
                began = time.perf_counter()
                subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
                times.append(time.perf_counter() - began)
            rows.append([label, f"{repeats}", f"{statistics.median(times):.2f} s"])
        return table(["", "runs", "time"], rows)


def main() -> None:
    """Measure, print the tables, and write them into the page."""
    parts = ["limits", "ceiling", "growth", "start"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, one run of each")
    parser.add_argument("--repeats", type=int, help="runs of each (3, with --quick 1)")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--page", type=Path, help="write tables and plots into this page")
    parser.add_argument("--runs", type=Path, help="keep runs there; go on where they end")
    options = parser.parse_args()
    page: Path | None = options.page
    with tempfile.TemporaryDirectory() as place:
        plots = page.with_name("performance") if page else Path(place)
        plots.mkdir(exist_ok=True)
        repeats = options.repeats or (1 if options.quick else 3)
        bench = Bench(options.quick, Runs(repeats, options.runs), plots)
        machine = f"{os.cpu_count()} cores, {platform.system()}"
        for part in options.only:
            text = getattr(bench, part)()
            text += f"\n\nMedians; {machine}, Python {platform.python_version()}."
            text += "".join(
                f"\n\n![{plot.stem}]({plots.name}/{plot.name})"
                for plot in sorted(plots.glob(f"{part}*.svg"))
            )
            print(f"## {part}\n\n{text}\n", flush=True)
            if page:
                write_between_markers(page, part, text)


if __name__ == "__main__":
    main()
