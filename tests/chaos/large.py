"""The large chaos run: a thousand kills, tens of thousands of rows, 10,000 simulated seeds.

`make chaos` runs all of it and writes the table of docs/reliability.md. Each case is kept in
`chaos.jsonl` when it has ended, so that an interrupted run goes on where it was. The exit status
is 1 if an invariant was violated or cases are missing. `python -m tests.chaos.large S3` runs the
scenarios whose names contain `S3`; two such commands may run side by side.
"""

import argparse
import contextlib
import itertools
import json
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
from tests.chaos.scenarios import SCENARIOS, SERVICE, Scenario
from tests.chaos.table import SIMULATED, format_table, write_table
from tests.chaos.trials import BatchFactory, Totals, print_now
from tests.support.s3 import s3_server

_SEEDS_A_CASE = 100
_SIMULATION = f"{SIMULATED} on virtual time, a seed each run"
_RESULTS = Path("chaos.jsonl")


def _run_seed(seed):
    logging.disable(logging.CRITICAL)
    try:
        found, kills, _ = run_random_batch(seed)
    except Exception as error:  # noqa: BLE001 - the seed is reported
        return seed, None, 0, f"{type(error).__name__}: {error}"
    return seed, found, kills, "" if not found.problems else str(found)


def _simulate(_factory, line, _rng, number):
    """Simulate batches in another process, whose memory ends with the case."""
    first = 1_000_000 + number * _SEEDS_A_CASE
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        for seed, found, kills, problem in pool.imap(
            _run_seed, range(first, first + _SEEDS_A_CASE), chunksize=10
        ):
            line.runs += 1
            if found is not None:
                line.add(found, kills)
            else:
                line.problems += 1
            if problem:
                print_now(f"     seed {seed}: {problem}")


_ALL = SCENARIOS | {_SIMULATION: Scenario(10_000 // _SEEDS_A_CASE, _simulate)}


@contextlib.contextmanager
def _batch_factories():
    """Yield a context manager that makes the batch factory of a scenario; some use S3."""
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        s3_server() as (bucket, client),
    ):
        access = {
            "FSSPEC_S3_ENDPOINT_URL": client.meta.endpoint_url,
            "FSSPEC_S3_KEY": "testing",
            "FSSPEC_S3_SECRET": "testing",
        }
        numbers = itertools.count()

        @contextlib.contextmanager
        def factory(name):
            with running_sandbox(SERVICE) as service, contextlib.ExitStack() as stack:
                where = (bucket, access) if "S3" in name else ()
                here = Path(folder) / f"{next(numbers)}"
                yield BatchFactory(here, service, stack, *where)
                stack.close()
                shutil.rmtree(here, ignore_errors=True)

        yield factory


def _read_results(path):
    """Return the totals and seconds of the ended cases, by scenario and number."""
    results = {}
    for text in path.read_text().splitlines() if path.exists() else ():
        kept = json.loads(text)
        totals = Totals.from_json(kept["totals"])
        results[kept["scenario"], kept["case"]] = (totals, kept["seconds"])
    return results


def _run_case(name, number, factory, seed):
    line = Totals()
    try:
        rng = random.Random(f"{seed} {name} {number}")
        _ALL[name].run(factory, line, rng, number)
    except Exception:  # noqa: BLE001 - the other cases still run
        line.problems += 1
        print_now(traceback.format_exc())
    return line


def _run_missing(names, seed, path):
    """Run the cases that are not in the results, and append each as it ends."""
    ended = _read_results(path)
    with _batch_factories() as make_factory:
        for name in names:
            missing = [n for n in range(_ALL[name].cases) if (name, n) not in ended]
            if not missing:
                continue
            with make_factory(name) as factory:
                for number in missing:
                    began = time.monotonic()
                    line = _run_case(name, number, factory, seed)
                    seconds = round(time.monotonic() - began, 1)
                    kept = {"scenario": name, "case": number, "seconds": seconds}
                    with path.open("a") as file:
                        file.write(json.dumps(kept | {"totals": line.to_json()}) + "\n")
                    print_now(f"{name}, case {number + 1}: {line}; {seconds:.0f} s")


def main():
    """Run the scenarios whose names contain one of the words, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", default=[""])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=_RESULTS, help="file of ended cases")
    parser.add_argument("--write", action="store_true", help="write the table into the docs")
    options = parser.parse_args()
    names = [name for name in _ALL if any(word.lower() in name.lower() for word in options.words)]
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # A background process and its children ignore Ctrl-C unless a handler is set.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _run_missing(names, options.seed, options.results)
    except KeyboardInterrupt:
        print_now("Interrupted: the same command goes on from here.")
    results = _read_results(options.results)
    missing = sum(scenario.cases for scenario in _ALL.values()) - len(results)
    table = {}
    for name in _ALL:
        of_scenario = [totals for (named, _), (totals, _) in results.items() if named == name]
        if of_scenario:
            table[name] = sum(of_scenario, start=Totals())
    minutes = sum(seconds for _, seconds in results.values()) / 60
    text = format_table(table, minutes=minutes, missing=missing)
    print_now(text)
    if options.write:
        write_table(text)
    return int(missing > 0 or any(line.broken() for line in table.values()))


if __name__ == "__main__":
    sys.exit(main())
