"""Time and peak memory of a plan, beside reading the same file with pyarrow alone.

    python benchmarks/plan.py --rows 10000 100000 1000000

Each measurement is a process of its own, so that its peak is its own. Needs the extra `parquet`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORK = ("pyarrow", "plan")


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--kinds", nargs="+", default=["csv", "parquet"])
    parser.add_argument("--work", nargs=2, metavar=("WORK", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work, path = options.work
        if work == "write":
            write(Path(path), int(Path(path).stem.partition("-")[2]))
            print("{}")
        else:
            print(json.dumps(measure(work, path)))
        return
    print("| rows | file | bytes | what | seconds | of CPU | peak MB | at the start |")
    print("|---:|---|---:|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for rows in options.rows:
            for kind in options.kinds:
                path = Path(folder) / f"manifest-{rows}.{kind}"
                # Also the writing: a process starts with the peak of the one that started it.
                work_on("write", path)
                for work in WORK:
                    figures = work_on(work, path)
                    print(
                        f"| {rows:,} | {kind} | {path.stat().st_size:,} | {work} "
                        f"| {figures['seconds']:.2f} | {figures['cpu']:.2f} "
                        f"| {figures['peak']:.0f} | {figures['start']:.0f} |",
                        flush=True,
                    )


def work_on(work: str, path: Path) -> dict[str, float]:
    """Do a piece of work in a process of its own, and tell what it measured."""
    command = [sys.executable, __file__, "--work", work, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def write(path: Path, rows: int) -> None:
    """A manifest like a shop's: an id, a picture, a prompt of a few words, a column of its own."""
    import pyarrow as pa  # noqa: PLC0415
    from pyarrow import csv, parquet  # noqa: PLC0415

    schema = pa.schema([(name, pa.string()) for name in ("id", "image", "prompt", "sku")])
    kind = csv.CSVWriter if path.suffix == ".csv" else parquet.ParquetWriter
    with kind(str(path), schema) as file:
        for start in range(0, rows, 50_000):
            numbers = range(start, min(start + 50_000, rows))
            columns = (
                [f"product-{n}" for n in numbers],
                [f"https://pictures.example.com/products/{n}/front.jpg" for n in numbers],
                [f"the product on a table of oak, as a watercolour, {n % 90}" for n in numbers],
                [f"SKU-{n:08}" for n in numbers],
            )
            file.write_table(pa.table(list(columns), schema=schema))


def measure(work: str, path: str) -> dict[str, float]:
    """Seconds, and megabytes at the peak and after the imports."""
    if work == "pyarrow":
        from pyarrow import csv, parquet  # noqa: PLC0415

        start, began, used = peak(), time.perf_counter(), time.process_time()
        rows = (parquet.read_table if path.endswith("parquet") else csv.read_csv)(path).num_rows
    else:
        from prefect_flux_kontext.batch.planning import make_plan  # noqa: PLC0415
        from prefect_flux_kontext.batch.policy import RowOptions  # noqa: PLC0415
        from prefect_flux_kontext.client.polling import PollingCadence  # noqa: PLC0415
        from prefect_flux_kontext.ledger.store import RecordStore  # noqa: PLC0415
        from prefect_flux_kontext.manifest.reader import Manifest  # noqa: PLC0415

        start, began, used = peak(), time.perf_counter(), time.process_time()
        plan = asyncio.run(
            make_plan(
                Manifest(path),
                RecordStore("memory://nothing-paid"),
                RowOptions(cadence=PollingCadence()),
                prices={"pro": 0.03, "max": 0.06},
                requests_per_minute=10_000,
                concurrent_tasks=1_000,
            )
        )
        rows = plan.to_pay
    seconds = time.perf_counter() - began
    if not path.rsplit("-", maxsplit=1)[-1].startswith(f"{rows}."):
        raise SystemExit(f"{path}: {rows} rows")
    return {"seconds": seconds, "cpu": time.process_time() - used, "peak": peak(), "start": start}


def peak() -> float:
    """Megabytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
