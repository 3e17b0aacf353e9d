"""CPU time and peak memory of plans and of runs with little or nothing new, beside pyarrow's read.

    python benchmarks/plan.py --rows 20000 100000

`plan` has an empty ledger. `plan again` has every row stored, `nothing new` is the run of that
plan, and `ten new` the run with ten rows more. Each measurement is a process of its own, so that
its peak is its own. Needs the extra `parquet`.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

NEW_ROWS = 10
WORKS = ("pyarrow", "plan", "plan again", "nothing new", "ten new")


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--kinds", nargs="+", default=["csv", "parquet"])
    parser.add_argument("--works", nargs="+", default=WORKS, choices=WORKS)
    parser.add_argument("--work", nargs=2, metavar=("WORK", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work, path = options.work
        print(json.dumps(do(work, Path(path))))
        return
    print("| rows | file | what | seconds | of CPU | CPU of a row | peak MB | at the start |")
    print("|---:|---|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder, sandbox() as service:
        os.environ |= {"FLUX_KONTEXT_BASE_URL": service.url, "FLUX_KONTEXT_API_KEY": "key"}
        for rows in options.rows:
            for kind in options.kinds:
                path = Path(folder) / f"manifest-{rows}.{kind}"
                # Also the writing: a process starts with the peak of the one that started it.
                work_on("write", path)
                if set(options.works) - {"pyarrow", "plan"}:
                    work_on("store", path)
                for work in options.works:
                    figures = work_on(work, path)
                    print(
                        f"| {rows:,} | {kind} | {work} | {figures['seconds']:.2f} "
                        f"| {figures['cpu']:.2f} | {figures['cpu'] / rows * 1e6:.1f} µs "
                        f"| {figures['peak']:.0f} | {figures['start']:.0f} |",
                        flush=True,
                    )
                shutil.rmtree(path.with_suffix(""), ignore_errors=True)


def sandbox() -> Any:
    """The service, in a thread of this process, which is not measured."""
    from prefect_flux_kontext.sandbox.server import running_sandbox  # noqa: PLC0415
    from prefect_flux_kontext.sandbox.settings import SandboxSettings  # noqa: PLC0415

    return running_sandbox(SandboxSettings(mean=0.05, long_edge=96, api_key="key"))


def work_on(work: str, path: Path) -> dict[str, float]:
    """Do a piece of work in a process of its own, and tell what it measured."""
    command = [sys.executable, __file__, "--work", work, str(path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def do(work: str, path: Path) -> dict[str, float]:
    """Write the files of a measurement, or measure."""
    rows = int(path.stem.partition("-")[2])
    longer = path.with_stem(f"longer-{rows}")
    output = path.with_suffix("")
    if work == "write":
        write(path, rows)
        write(longer, rows, new=NEW_ROWS)
        return {}
    if work == "store":
        asyncio.run(store(path, output))
        return {}
    if work == "pyarrow":
        from pyarrow import csv, parquet  # noqa: PLC0415

        read = parquet.read_table if path.suffix == ".parquet" else csv.read_csv
        return measure(lambda: read(path).num_rows, rows)
    works: dict[str, tuple[Callable[[], Awaitable[int]], int]] = {
        "plan": (lambda: plan(path, "memory://nothing-paid"), rows),
        "plan again": (lambda: plan(path, str(output)), 0),
        "nothing new": (lambda: run(path, output), rows),
        "ten new": (lambda: run(longer, output), rows + NEW_ROWS),
    }
    function, expected = works[work]
    import_all()
    return measure(lambda: asyncio.run(function()), expected)  # type: ignore[arg-type]


def measure(function: Callable[[], int], expected: int) -> dict[str, float]:
    """Seconds, and megabytes at the peak and after the imports."""
    start, began, used = peak(), time.perf_counter(), time.process_time()
    if (found := function()) != expected:
        raise SystemExit(f"{found} rows instead of {expected}")
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "cpu": time.process_time() - used, "peak": peak(), "start": start}


def import_all() -> None:
    """Import what the works import, so that it is not measured."""
    import pyarrow.parquet  # noqa: F401, PLC0415

    from prefect_flux_kontext.batch import planning, runner, session  # noqa: F401, PLC0415


def write(path: Path, rows: int, new: int = 0) -> None:
    """A manifest like a shop's: an id, a picture, a prompt of a few words, a column of its own.

    New rows come last and have no picture, which the sandbox would look for.
    """
    import pyarrow as pa  # noqa: PLC0415
    from pyarrow import csv, parquet  # noqa: PLC0415

    schema = pa.schema([(name, pa.string()) for name in ("id", "image", "prompt", "sku")])
    kind = csv.CSVWriter if path.suffix == ".csv" else parquet.ParquetWriter
    with kind(str(path), schema) as file:
        for start in range(0, rows + new, 50_000):
            numbers = range(start, min(start + 50_000, rows + new))
            columns = (
                [f"product-{n}" for n in numbers],
                [
                    f"https://pictures.example.com/products/{n}/front.jpg" if n < rows else ""
                    for n in numbers
                ],
                [f"the product on a table of oak, as a watercolour, {n % 90}" for n in numbers],
                [f"SKU-{n:08}" for n in numbers],
            )
            file.write_table(pa.table(list(columns), schema=schema))


async def store(path: Path, output: Path) -> None:
    """Make an output in which every row is stored: ledger, images, results and gallery."""
    from PIL import Image  # noqa: PLC0415

    from prefect_flux_kontext.batch.waves import WAVE_ROWS  # noqa: PLC0415
    from prefect_flux_kontext.ledger.records import Ended  # noqa: PLC0415
    from prefect_flux_kontext.ledger.waves import FinishedRow  # noqa: PLC0415
    from prefect_flux_kontext.manifest.reader import Manifest  # noqa: PLC0415
    from prefect_flux_kontext.manifest.row import Row  # noqa: PLC0415
    from prefect_flux_kontext.models import StoredImage, utc_now  # noqa: PLC0415

    waves = output / "_ledger" / "waves"
    waves.mkdir(parents=True)
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG")
    lines: list[str] = []
    for number, row in enumerate(Manifest(str(path)).rows(), start=1):
        assert isinstance(row, Row)
        name = f"{row.name}.jpg"
        (output / name).write_bytes(file.getvalue())
        image = StoredImage(
            uri=f"file://{output / name}",
            task_id=f"task_{row.key}",
            format="jpeg",
            size=len(file.getvalue()),
            sha256=f"{number:064x}",
            width=8,
            height=8,
        )
        ended = Ended(
            state="stored",
            task_id=f"task_{row.key}",
            files=[name],
            images=[image],
            submitted_at=utc_now(),
            completed_at=utc_now(),
            generation_seconds=12.3,
            waiting_seconds=14.5,
            download_seconds=0.123,
        )
        finished = FinishedRow(
            key=row.key, row_id=row.id, attempt=1, spent=0.03, failures=0, ended=ended
        )
        lines.append(f"{finished.model_dump_json(exclude_none=True)}\n")
        if len(lines) == WAVE_ROWS:
            (waves / f"{'a' * 16}-{number // WAVE_ROWS:06}.jsonl").write_text("".join(lines))
            lines = []
    (waves / f"{'a' * 16}-000000.jsonl").write_text("".join(lines))
    await run(path, output)


async def plan(path: Path, output: str) -> int:
    """Plan the manifest, and return the number of rows to be paid."""
    from prefect_flux_kontext.batch.planning import make_plan  # noqa: PLC0415
    from prefect_flux_kontext.batch.policy import RowOptions  # noqa: PLC0415
    from prefect_flux_kontext.client.polling import PollingCadence  # noqa: PLC0415
    from prefect_flux_kontext.ledger.store import open_ledger_store  # noqa: PLC0415
    from prefect_flux_kontext.manifest.reader import Manifest  # noqa: PLC0415
    from prefect_flux_kontext.storage.filesystem import OutputFolder  # noqa: PLC0415

    made = await make_plan(
        Manifest(str(path)),
        open_ledger_store(OutputFolder(output)),
        RowOptions(cadence=PollingCadence()),
        prices={"pro": 0.03, "max": 0.06},
        requests_per_minute=10_000,
        concurrent_tasks=1_000,
    )
    return made.to_pay


async def run(path: Path, output: Path) -> int:
    """Run the manifest as `flux-kontext run` does after its plan; return the rows stored."""
    from prefect_flux_kontext.batch.policy import RowOptions  # noqa: PLC0415
    from prefect_flux_kontext.batch.runner import run_batch  # noqa: PLC0415
    from prefect_flux_kontext.batch.session import open_session  # noqa: PLC0415
    from prefect_flux_kontext.client.client import FluxKontextClient  # noqa: PLC0415
    from prefect_flux_kontext.client.polling import PollingCadence  # noqa: PLC0415
    from prefect_flux_kontext.manifest.reader import Manifest  # noqa: PLC0415
    from prefect_flux_kontext.settings import FluxKontextSettings  # noqa: PLC0415
    from prefect_flux_kontext.storage.filesystem import OutputFolder  # noqa: PLC0415

    settings = FluxKontextSettings(match_references=False, gallery_references=False)
    client = FluxKontextClient(settings.require_api_key(), base_url=settings.base_url)
    options = RowOptions(cadence=PollingCadence(initial_delay=0, interval=0.2))
    folder = OutputFolder(str(output))
    async with open_session(client, folder, options, settings) as session:
        rows = Manifest(str(path)).rows()
        summary = await run_batch(
            session, rows, lambda wave: wave.run(), concurrent_tasks=settings.concurrent_tasks
        )
    return summary.stored


def peak() -> float:
    """Megabytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
