"""What batches go through at large: kills, signals, sleep, company, and bad weather."""

import signal
import sys
from dataclasses import dataclass
from functools import partial

from prefect_flux_kontext.sandbox.faults.plan import FaultPlan
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from tests.chaos.processes import Batch
from tests.chaos.troubles import ALL, STOPPING, shares

SERVICE = SandboxSettings(mean=1.0, long_edge=16, fail_rate=0.02, requests_per_minute=1_000_000)
TROUBLE = (
    "submit:lost-reply=0.01",
    "submit:closed=0.005",
    "submit:trouble-after=0.005",
    "submit:unavailable=0.01",
    "submit:reset=0.005",
    # Few, for each makes the governor careful for half a minute, by design.
    "submit:limited=0.001",
    "submit:limited-in-200=0.001",
    "status:unavailable=0.02",
    "status:closed=0.01",
    "download:unavailable=0.02",
    "download:half=0.01",
    "download:reset=0.01",
)
STEPS = {
    "create": 12,
    "replace": 3,
    "remove": 2,
    "read": 8,
    "image": 3,
    "request": 9,
    "download": 3,
}


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
            "FLUX_KONTEXT_POLL_TIMEOUT": "15",
        } | (access or {})
        self.number = 0

    def weather(self, dice, faults):
        """Begin to let things go wrong."""
        plan = FaultPlan(faults=faults, seed=dice.getrandbits(32), hang=0.5, slow=0.5)
        self.service.weather.change(plan)

    def batch(self, rows):
        self.number += 1
        folder = self.folder / f"{self.number}"
        folder.mkdir(parents=True)
        output = f"{self.bucket}/{self.folder.name}/{self.number}" if self.bucket else None
        batch = Batch(self.service, folder, output, **self.environment)
        name = f"{self.folder.name} {self.number}"
        batch.write([(f"row-{n}", f"{name} lighthouse {n}") for n in range(rows)])
        return batch


def finish(line, batch, runs):
    """Run to the end, check, and check that a further run pays for nothing.

    The first of the runs meets the weather as it is, the others meet none.
    """
    batch.run()
    batch.service.weather.change(FaultPlan())
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
    line.add(found, batch, runs + 2)


def at_random(place, line, dice, scale, *, batches, rows, kills):
    """`kill -9` at random moments under a network with faults of every kind."""
    for number in range(max(1, round(batches * scale))):
        place.weather(dice, TROUBLE)
        batch = place.batch(rows)
        for _ in range(kills):
            batch.run_and_kill(dice.uniform(0.15, 1.2))
        finish(line, batch, kills)
        tell(f"    batch {number + 1}: {batch.kills} kills, {line}")


def each_fault(place, line, dice, scale, *, kind, rows=500):
    """A batch under each fault of a kind alone, killed once."""
    for fault in [fault for fault in ALL if fault.startswith(f"{kind}:")]:
        # A key that is refused is refused from some moment on; the others befall at least once.
        planned = [f"{fault}@10-"] if fault in STOPPING else [f"{fault}@5", *shares([fault], 0.05)]
        place.weather(dice, planned)
        batch = place.batch(round(rows * scale))
        batch.run_and_kill(dice.uniform(0.3, 2))
        befallen = place.service.weather.befallen
        finish(line, batch, 1)
        tell(f"    {fault}: befell {befallen[fault]}, {line}")


def all_faults(place, line, dice, scale, *, batches=4, rows=500):
    """Batches under all faults at once but those that stop a batch, killed at random."""
    together = [fault for fault in ALL if fault not in STOPPING]
    for _ in range(max(1, round(batches * scale))):
        place.weather(dice, shares(together, 0.004))
        batch = place.batch(rows)
        for _ in range(8):
            batch.run_and_kill(dice.uniform(0.3, 2))
        finish(line, batch, 8)


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
        place.weather(dice, TROUBLE)
        batch = place.batch(rows)
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
        place.weather(dice, ["submit:lost-reply=0.01", "submit:trouble-after=0.01"])
        finish(line, place.batch(500), 0)


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


SCENARIOS = {
    "kills at random, faults of every kind, local disk": lambda *a: at_random(
        *a, batches=9, rows=1_000, kills=14
    ),
    "killed before and after each read, write, request, image": at_every_step,
    "kills at random, ledger and images on S3 (moto)": lambda *a: at_random(
        *a, batches=2, rows=150, kills=10
    ),
    "killed at a quarter of the steps, on S3 (moto)": lambda place, line, dice, scale: (
        at_every_step(place, line, dice, scale / 4, rows=2)
    ),
    "each fault of a submit alone": partial(each_fault, kind="submit"),
    "each fault of a status request alone": partial(each_fault, kind="status"),
    "each fault of a download alone": partial(each_fault, kind="download"),
    "each fault of a task alone": partial(each_fault, kind="task"),
    "all these faults together": all_faults,
    "two started together": lambda *a: together(*a, starts=2),
    "five started together": lambda *a: together(*a, starts=5),
    "SIGTERM and SIGINT at random": told_to_stop,
    "frozen, overtaken by a second run, woken": sleepers,
    "2 % of replies lost after acceptance": lost_replies,
}
