"""The large chaos run: hundreds of kills, thousands of rows, thousands of simulated seeds.

`make chaos` runs all of it, prints one line for each scenario and writes the table of
docs/reliability.md. The exit status is 1 if an invariant was violated.
`python -m tests.chaos.large --scale 0.1 random-local` runs a tenth of one scenario and writes
nothing.
"""

import argparse
import contextlib
import itertools
import logging
import multiprocessing
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

from prefect_flux_kontext.sandbox.server import running_sandbox
from tests.chaos.random_batch import run_random_batch
from tests.chaos.scenarios import SCENARIOS, SERVICE
from tests.chaos.table import SIMULATED, format_table, write_table
from tests.chaos.trials import BatchFactory, Totals, print_now
from tests.support.s3 import s3_server


def _run_seed(seed):
    logging.disable(logging.CRITICAL)
    try:
        found, kills, _ = run_random_batch(seed)
    except Exception as error:  # noqa: BLE001 - the seed is reported
        return seed, None, 0, f"{type(error).__name__}: {error}"
    return seed, found, kills, "" if not found.problems else str(found)


@contextlib.contextmanager
def simulating(scale):
    """Simulate batches in another process; yield the function that adds up their findings."""
    seeds = range(1_000_000, 1_000_000 + round(10_000 * scale))
    with multiprocessing.get_context("forkserver").Pool(1, maxtasksperchild=100) as pool:
        outcomes = pool.imap_unordered(_run_seed, seeds, chunksize=10)

        def simulation(line):
            for seed, found, kills, problem in outcomes:
                if found is not None:
                    line.add(found, kills)
                else:
                    line.problems += 1
                line.runs += 1
                if problem:
                    print_now(f"     seed {seed}: {problem}")
                if line.runs % 500 == 0:
                    print_now(f"    {line}")

        yield simulation


SIMULATION = f"{SIMULATED} on virtual time, a seed each run"


@contextlib.contextmanager
def batch_factories():
    """Yield a context manager that makes the batch factory of a scenario; some use S3."""
    with tempfile.TemporaryDirectory() as folder, s3_server() as (bucket, client):
        access = {
            "FSSPEC_S3_ENDPOINT_URL": client.meta.endpoint_url,
            "FSSPEC_S3_KEY": "testing",
            "FSSPEC_S3_SECRET": "testing",
        }
        numbers = itertools.count()

        @contextlib.contextmanager
        def factory(name):
            with running_sandbox(SERVICE) as service:
                where = (bucket, access) if "S3" in name else ()
                here = Path(folder) / f"{next(numbers)}"
                yield BatchFactory(here, service, *where)
                shutil.rmtree(here)

        yield factory


def run(names, scale, seed, table):
    """Run scenarios, and add the totals of each to the table."""
    began = time.monotonic()
    beside = simulating(scale) if SIMULATION in names else contextlib.nullcontext()
    with batch_factories() as factory, beside as simulation:
        for name in names:
            print_now(f"{name} …")
            line = Totals()
            try:
                if name == SIMULATION:
                    simulation(line)
                else:
                    with factory(name) as here:
                        SCENARIOS[name](here, line, random.Random(f"{seed} {name}"), scale)
            except Exception:  # noqa: BLE001 - the other scenarios still run
                line.problems += 1
                print_now(traceback.format_exc())
            table[name] = line
            print_now(f"{name}: {line}; {time.monotonic() - began:.0f} s since the start")


def main():
    """Run the scenarios whose names contain one of the words, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", default=[""])
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="write the table into the docs")
    options = parser.parse_args()
    names = [
        name
        for name in [*SCENARIOS, SIMULATION]
        if any(word.lower() in name.lower() for word in options.words)
    ]
    table = {}
    began = time.monotonic()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # A background process and its children ignore Ctrl-C unless a handler is set.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run(names, options.scale, options.seed, table)
    except KeyboardInterrupt:
        print_now("Interrupted: scenarios that had not ended are not counted.")
    minutes = (time.monotonic() - began) / 60
    text = format_table(table, scale=options.scale, minutes=minutes, left=len(names) - len(table))
    print_now(text)
    if options.write:
        write_table(text)
    return int(len(table) < len(names) or any(line.broken() for line in table.values()))


if __name__ == "__main__":
    sys.exit(main())
