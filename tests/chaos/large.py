"""The promise at large: hundreds of kills, thousands of rows, thousands of simulated seeds.

`make chaos` runs all of it, prints one line for each scenario and writes the table of
docs/reliability.md; the exit status is 1 where the promise was broken.
`python -m tests.chaos.large --scale 0.1 random-local` runs a tenth of one scenario and writes
nothing.
"""

import argparse
import logging
import multiprocessing
import random
import sys
import tempfile
import time
from pathlib import Path

from prefect_flux_kontext.sandbox.server import running_sandbox
from tests.chaos.scenarios import SCENARIOS, SERVICE, Line, Place, tell
from tests.chaos.story import story
from tests.chaos.table import SIMULATED, as_table, write_table
from tests.support.s3 import s3_server


def _story(seed):
    logging.disable(logging.CRITICAL)
    try:
        found, kills, _ = story(seed)
    except Exception as error:  # noqa: BLE001 - the seed is what counts
        return seed, None, 0, f"{type(error).__name__}: {error}"
    return seed, found, kills, "" if not found.problems else str(found)


def simulation(line, scale):
    """Whole batches on virtual time; kills are those of simulated processes."""
    seeds = range(1_000_000, 1_000_000 + round(10_000 * scale))
    with multiprocessing.get_context("forkserver").Pool(2, maxtasksperchild=200) as pool:
        for seed, found, kills, problem in pool.imap_unordered(_story, seeds, chunksize=10):
            if found is not None:
                line.add(found)
            line.runs += 1
            line.kills += kills
            if problem:
                line.problems += found is None
                tell(f"     seed {seed}: {problem}")


SIMULATION = f"{SIMULATED} on virtual time, a seed each run"


def main():
    """Run the scenarios whose names hold one of the words, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", default=[""])
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="write the table into the docs")
    options = parser.parse_args()
    chosen = [
        name
        for name in [*SCENARIOS, SIMULATION]
        if any(word.lower() in name.lower() for word in options.words)
    ]
    table = {}
    began = time.monotonic()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder, s3_server() as (bucket, client):
        access = {
            "FSSPEC_S3_ENDPOINT_URL": client.meta.endpoint_url,
            "FSSPEC_S3_KEY": "testing",
            "FSSPEC_S3_SECRET": "testing",
        }
        for number, name in enumerate(chosen):
            line = table[name] = Line()
            dice = random.Random(f"{options.seed} {name}")
            if name == SIMULATION:
                simulation(line, options.scale)
            else:
                with running_sandbox(SERVICE) as service:
                    where = (bucket, access) if "S3" in name else ()
                    place = Place(Path(folder) / f"{number}", service, *where)
                    SCENARIOS[name](place, line, dice, options.scale)
            tell(f"{name}: {line}, {time.monotonic() - began:.0f} s")
    text = as_table(table, scale=options.scale, minutes=(time.monotonic() - began) / 60)
    tell(text)
    if options.write:
        write_table(text)
    return int(any(line.broken() for line in table.values()))


if __name__ == "__main__":
    sys.exit(main())
