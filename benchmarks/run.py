"""Everything that docs/performance.md tells, measured side by side: `make bench`.

    python benchmarks/run.py                        # all of it, small, in about 15 minutes
    python benchmarks/run.py --whole                # at full size, in about three hours
    python benchmarks/run.py --only limits start    # parts
    python benchmarks/run.py --page docs/performance.md

Sandbox and Prefect server run in processes of their own, and so does each piece of work. Each
figure is the median of its runs. Targets come first on the page, with the figures of the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from chart import bars, table, write_between_markers
from measuring import UNLIMITED, Account, Runs

CEILING = (("96 px JPEG", "jpeg", 96, 4_000, 1_000), ("1 MB PNG", "png", 1_024, 2_000, 200))
"""What the images are called; their format and long edge; how many, and how many for what is
slow, or if small."""

ROOT = Path(__file__).parents[1]
ALL_SLOTS, PUBLISHED_REQUESTS = 1_000, 10_000


@dataclass(frozen=True)
class Bench:
    """How much is measured, and where plots go."""

    quick: bool
    runs: Runs
    plots: Path
    targets: list[list[str]] = field(default_factory=list)

    def target(
        self,
        what: str,
        figure: float,
        form: str,
        *,
        least: float | None = None,
        most: float | None = None,
    ) -> None:
        """Put a target and its figure into the page's first table."""
        limit = most if least is None else least
        assert limit is not None
        is_met = figure <= limit if least is None else figure >= limit
        wanted = f"{'at most' if least is None else 'at least'} {form.format(limit)}"
        mark = "met" if is_met else "**missed**"
        self.targets.append([what, wanted, form.format(figure), mark])

    def sizes(self) -> str:
        """Accounts of all sizes, simulated, and the small ones in real time."""
        seeds = "2" if self.quick else "8"
        command = ["-m", "benchmarks.limiter", "--sizes", "--json", "--seeds", seeds]
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
        )
        rows = []
        for one in map(json.loads, done.stdout.splitlines()):
            name, slots, used = one["account"], one["slots"], one["slots used"]
            refused = one["submits refused %"]
            real = ""
            most, mean = (100, 2) if self.quick else (300, 10)
            if one["requests a minute"] == PUBLISHED_REQUESTS and slots <= most:
                account = Account(mean=mean, slots=slots)
                measured = self.runs.medians("batch", account, 20 * slots, most=1)
                real = f"{measured['slots_used']:.1%}"
                what = f"{name}, in real time: of polling at the floor"
                self.target(what, measured["slots_used"] / one["floor"], "{:.1%}", least=0.98)
            if one["requests a minute"] == PUBLISHED_REQUESTS:
                what = f"{name}: slots used, of polling at the floor"
                self.target(what, used / one["floor"], "{:.1%}", least=0.98)
                limit = 0.1 if slots == ALL_SLOTS else 0.2
                self.target(f"{name}: submits refused", refused, "{:.2f} %", most=limit)
                self.target(f"{name}, called back", one["called back"], "{:.1%}", least=0.99)
            else:
                self.target(f"{name}: slots used", used, "{:.1%}", least=0.85)
            rows.append(
                [
                    name,
                    f"{used:.1%}",
                    f"{one['floor']:.1%}",
                    f"{one['clairvoyant']:.1%}",
                    f"{one['called back']:.1%}",
                    f"{refused:.3f} %",
                    f"{one['requests an image']:.2f}",
                    real,
                ]
            )
        columns = ["", "slots used", "at the floor", "clairvoyant", "called back"]
        columns += ["submits refused", "requests/image", "in real time"]
        return table(columns, rows)

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
        polled, called = (one["slots_used"] for one in list(figures.values())[:2])
        self.target("In real time: slots used, polled", polled, "{:.1%}", least=0.93)
        self.target("In real time: slots used, called back", called, "{:.1%}", least=0.99)
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
                "asyncio and aiohttp": ("bare", bare, images),
                "Prefect, `.map` of three tasks": ("mapped", bare, 30 if self.quick else few),
            }
            figures = {
                name: (self.runs.medians(*how, kind=kind), how[2]) for name, how in works.items()
            }
            ours, script = (figures[name][0] for name in ("this package", "asyncio and aiohttp"))
            what = f"{label}: images a second, of a bare script"
            least = {"jpeg": 0.5, "png": 0.85}[kind]
            self.target(what, script["seconds"] / ours["seconds"], "{:.2f}", least=least)
            if kind == "jpeg":
                what = f"{label}: CPU an image"
                self.target(what, ours["cpu"] / images * 1000, "{:.1f} ms", most=4.5)
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
        if not self.quick:
            few, many = figures[10_000], figures[100_000]
            peak = many["peak_mb"] - figures[1_000]["peak_mb"]
            self.target("Memory of 100,000 rows, over 1,000", peak, "{:.0f} MB", most=50)
            more = (many["cpu"] - few["cpu"]) / 90_000 / (few["cpu"] - first["cpu"]) * 9_999
            what = "CPU of a further image with 100,000 rows, of that with 10,000"
            self.target(what, more, "{:.2f}", most=1.1)
        columns = (
            "rows, runs, time, a further image, CPU time, a further image, peak memory, "
            "its end phase, memory for that, ledger objects an image, task runs, events an image"
        )
        plot = bars("Peak memory of a batch as a flow", " MB", peaks)
        (self.plots / "growth.svg").write_text(plot)
        return table(columns.split(", "), rows)

    def plans(self) -> str:
        """Plans, and runs with little new, beside reading the same file with pyarrow."""
        rows = 20_000 if self.quick else 999_990  # ten more are the most that a manifest has
        command = [sys.executable, str(ROOT / "benchmarks/plan.py"), "--rows", str(rows)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        lines = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()]
        for file in ("csv", "parquet"):
            found = [dict(zip(lines[0], line, strict=False)) for line in lines[2:]]
            found = [one for one in found if one["file"] == file]
            cpu = {one["what"]: float(one["of CPU"]) for one in found}
            what = f"{rows:,} rows in {file}"
            self.target(
                f"{what}: CPU of a row's plan", cpu["plan"] / rows * 1e6, "{:.0f} µs", most=25
            )
            again = cpu["plan again"]
            self.target(
                f"{what}, nothing new: of the plan", cpu["nothing new"] / again, "{:.2f}", most=1.5
            )
            more = (cpu["ten new"] - again) / rows * 1e6
            what = f"{what}, ten new: CPU over the plan, for a million"
            self.target(what, more, "{:.0f} s", most=20)
            peak = max(float(one["peak MB"]) for one in found if one["what"] != "pyarrow")
            self.target(f"{rows:,} rows in {file}: peak memory", peak, "{:.0f} MB", most=300)
        return done.stdout.strip()

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
    parts = ["sizes", "limits", "ceiling", "growth", "plans", "start"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--whole", action="store_true", help="full sizes, three runs of each")
    parser.add_argument("--repeats", type=int, help="runs of each (1, with --whole 3)")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--page", type=Path, help="write tables and plots into this page")
    parser.add_argument("--runs", type=Path, help="keep runs there; go on where they end")
    options = parser.parse_args()
    page: Path | None = options.page
    with tempfile.TemporaryDirectory() as place:
        plots = page.with_name("performance") if page else Path(place)
        plots.mkdir(exist_ok=True)
        repeats = options.repeats or (3 if options.whole else 1)
        bench = Bench(not options.whole, Runs(repeats, options.runs), plots)
        size = "full size" if options.whole else "small, `make bench` without `BENCH=--whole`"
        machine = f"{os.cpu_count()} cores, {platform.system()}"
        made = f"{size}; {machine}, Python {platform.python_version()}"

        def show(part: str, text: str) -> None:
            print(f"## {part}\n\n{text}\n", flush=True)
            if page:
                write_between_markers(page, part, text)

        for part in options.only:
            text = f"{getattr(bench, part)()}\n\nMedians, {made}."
            text += "".join(
                f"\n\n![{plot.stem}]({plots.name}/{plot.name})"
                for plot in sorted(plots.glob(f"{part}*.svg"))
            )
            show(part, text)
        if options.only == parts:
            columns = ["target", "wanted", "measured", ""]
            load = f"load {os.getloadavg()[2]:.1f} over the last 15 minutes"
            show(
                "targets",
                f"{table(columns, bench.targets)}\n\nMeasured in one run: {made}, {load}.",
            )


if __name__ == "__main__":
    main()
