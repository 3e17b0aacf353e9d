"""The promise at large: hundreds of kills, thousands of rows, thousands of simulated seeds.

`make chaos` runs all of it and prints one line for each scenario; the exit status is 1 where
the promise was broken. `python -m tests.chaos.large --scale 0.1 random-local` runs a tenth of
one scenario.
"""

import argparse
import logging
import multiprocessing
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, fields
from pathlib import Path

from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from tests.chaos.processes import Batch
from tests.chaos.story import story
from tests.support.fault_proxy import fault_proxy
from tests.support.s3 import s3_server

SERVICE = SandboxSettings(mean=1.0, long_edge=16, fail_rate=0.02, requests_per_minute=1_000_000)
TROUBLE = {
    "submit": {
        "reset_after": 0.01,
        "closed_after": 0.005,
        "trouble_after": 0.005,
        "trouble_before": 0.01,
        "reset_before": 0.005,
        # Few, for each makes the governor careful for half a minute, by design.
        "limited": 0.001,
        "limited_in_200": 0.001,
    },
    "status": {"trouble_before": 0.02, "closed_after": 0.01},
    "download": {"trouble_before": 0.02, "half": 0.01, "reset_before": 0.01},
}
STEPS = {"create": 12, "replace": 3, "remove": 2, "read": 8, "image": 3, "request": 12}


def tell(text):
    """Say it now."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


@dataclass
class Line:
    """A line of the table."""

    runs: int = 0
    rows: int = 0
    kills: int = 0
    paid_twice: int = 0
    lost: int = 0
    missing: int = 0
    unknown_held: int = 0
    problems: int = 0

    def add(self, found, batch=None, runs=0):
        self.rows += found.rows
        self.runs += runs
        self.kills += batch.kills if batch else 0
        self.paid_twice += found.paid_twice
        self.lost += found.lost
        self.missing += found.missing
        self.unknown_held += found.unknown
        self.problems += len(found.problems)
        for problem in found.problems[:5]:
            tell(f"     {problem}")

    def broken(self):
        return self.paid_twice or self.lost or self.missing or self.problems


class Place:
    """Folders, names and a service for the batches of a scenario."""

    def __init__(self, folder, service, bucket=None, access=None):
        self.folder = folder
        self.service = service
        self.bucket = bucket
        # Fewer polls than in the small tests: two cores serve all of it.
        self.environment = {
            "FLUX_KONTEXT_POLL_INITIAL_DELAY": "0.6",
            "FLUX_KONTEXT_POLL_INTERVAL": "0.5",
        } | (access or {})
        self.number = 0

    def batch(self, rows, url=None):
        self.number += 1
        folder = self.folder / f"{self.number}"
        folder.mkdir(parents=True)
        output = f"{self.bucket}/{self.folder.name}/{self.number}" if self.bucket else None
        batch = Batch(self.service, folder, output, url, **self.environment)
        name = f"{self.folder.name} {self.number}"
        batch.write([(f"row-{n}", f"{name} lighthouse {n}") for n in range(rows)])
        return batch


def finish(line, batch, runs):
    """Run to the end, check, and check that a further run pays for nothing."""
    for _ in range(5):
        ended = batch.run()
        runs += 1
        if ended.status in (0, 1):
            break
    found = batch.check()
    before = batch.accepted
    batch.run()
    if batch.accepted != before:
        found.problems.append(f"a finished batch paid for {batch.accepted - before} more")
    if found.stored + found.failed + found.unknown != found.rows:
        found.problems.append(f"rows do not add up: {found}")
    line.add(found, batch, runs + 1)


def at_random(place, line, dice, scale, *, batches, rows, kills):
    """`kill -9` at random moments under a network with faults of every kind."""
    for number in range(max(1, round(batches * scale))):
        with fault_proxy(place.service.url, seed=dice.random(), rates=TROUBLE) as proxy:
            batch = place.batch(rows, proxy.url)
            for _ in range(kills):
                batch.run_and_kill(dice.uniform(0.15, 1.2))
            finish(line, batch, kills)
        tell(f"    batch {number + 1}: {batch.kills} kills, {line}")


def at_every_step(place, line, _dice, scale, *, rows=3):
    """`kill -9` right before and right after each write, read, request and image."""
    bombs = [
        (point, when, number)
        for point, last in STEPS.items()
        for number in range(1, last + 1)
        for when in ("before", "after")
    ]
    for bomb in bombs[:: max(1, round(1 / scale))]:
        batch = place.batch(rows)
        batch.kills += batch.run(bomb=bomb).status == -signal.SIGKILL
        finish(line, batch, 1)


def together(place, line, dice, scale, *, starts, rows=150):
    """Several runs over one output at once; all but one are killed."""
    for _ in range(max(1, round(4 * scale))):
        with fault_proxy(place.service.url, seed=dice.random(), rates=TROUBLE) as proxy:
            batch = place.batch(rows, proxy.url)
            running = [batch.start_run() for _ in range(starts)]
            for victim in running[1:]:
                if victim.lives_for(dice.uniform(0.1, 1.5)):
                    batch.kills += 1
                victim.kill()
            running[0].end()
            finish(line, batch, starts)


def told_to_stop(place, line, dice, scale):
    """SIGTERM and SIGINT at random moments."""
    for number in range(max(1, round(20 * scale))):
        batch = place.batch(100)
        running = batch.start_run()
        running.lives_for(dice.uniform(0.3, 1.0))
        before = batch.accepted
        running.send((signal.SIGTERM, signal.SIGINT)[number % 2])
        running.end()
        if batch.accepted - before > 16:
            line.problems += 1
            tell(f"     {batch.accepted - before} were billed after the signal")
        finish(line, batch, 1)


def lost_replies(place, line, dice, scale):
    """Two of a hundred replies are lost after the service has accepted; nobody is killed."""
    for _ in range(max(1, round(2 * scale))):
        rates = {"submit": {"reset_after": 0.01, "trouble_after": 0.01}}
        with fault_proxy(place.service.url, seed=dice.random(), rates=rates) as proxy:
            batch = place.batch(500, proxy.url)
            finish(line, batch, 0)


def sleepers(place, line, dice, scale):
    """A run sleeps, another takes over, and the first wakes."""
    for _ in range(max(1, round(6 * scale))):
        batch = place.batch(60)
        sleeper = batch.start_run()
        sleeper.lives_for(dice.uniform(0.3, 0.8))
        sleeper.send(signal.SIGSTOP)
        other = batch.start_run()
        other.lives_for(3)
        sleeper.send(signal.SIGCONT)
        sleeper.end()
        other.end()
        finish(line, batch, 2)


def _story(seed):
    logging.disable(logging.CRITICAL)
    try:
        found, kills, _ = story(seed)
    except Exception as error:  # noqa: BLE001 - the seed is what counts
        return seed, None, 0, f"{type(error).__name__}: {error}"
    return seed, found, kills, "" if not found.problems else str(found)


def simulation(line, scale):
    """Whole batches on virtual time; kills are those of simulated processes."""
    seeds = range(1_000_000, 1_000_000 + round(3_000 * scale))
    with multiprocessing.get_context("forkserver").Pool(2, maxtasksperchild=200) as pool:
        for seed, found, kills, problem in pool.imap_unordered(_story, seeds, chunksize=10):
            if found is not None:
                line.add(found)
            line.runs += 1
            line.kills += kills
            if problem:
                line.problems += found is None
                tell(f"     seed {seed}: {problem}")


SCENARIOS = {
    "random-local": lambda *a: at_random(*a, batches=9, rows=1_000, kills=14),
    "steps-local": at_every_step,
    "two-together": lambda *a: together(*a, starts=2),
    "five-together": lambda *a: together(*a, starts=5),
    "told-to-stop": told_to_stop,
    "lost-replies": lost_replies,
    "sleepers": sleepers,
    "random-s3": lambda *a: at_random(*a, batches=2, rows=150, kills=10),
    "steps-s3": lambda place, line, dice, scale: at_every_step(
        place, line, dice, scale / 4, rows=2
    ),
}


def main():
    """Run the scenarios that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenarios", nargs="*", default=[*SCENARIOS, "simulation"])
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full size")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    table = {}
    with tempfile.TemporaryDirectory() as folder, s3_server() as (bucket, client):
        access = {
            "FSSPEC_S3_ENDPOINT_URL": client.meta.endpoint_url,
            "FSSPEC_S3_KEY": "testing",
            "FSSPEC_S3_SECRET": "testing",
        }
        for name in options.scenarios:
            line = table[name] = Line()
            began = time.monotonic()
            dice = random.Random(f"{options.seed} {name}")
            if name == "simulation":
                simulation(line, options.scale)
            else:
                logging.getLogger("werkzeug").setLevel(logging.ERROR)
                with running_sandbox(SERVICE) as service:
                    where = (bucket, access) if name.endswith("s3") else ()
                    place = Place(Path(folder) / name, service, *where)
                    SCENARIOS[name](place, line, dice, options.scale)
            tell(f"{name}: {line}, {time.monotonic() - began:.0f} s")
    _tell(table)
    return int(any(line.broken() for line in table.values()))


def _tell(table):
    columns = [field.name for field in fields(Line)]
    tell(f"\n{'scenario':<16}" + "".join(f"{name.replace('_', ' '):>14}" for name in columns))
    for name, line in table.items():
        tell(f"{name:<16}" + "".join(f"{getattr(line, column):>14,}" for column in columns))


if __name__ == "__main__":
    sys.exit(main())
