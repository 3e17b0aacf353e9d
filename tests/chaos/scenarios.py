"""The scenarios of the large run: kills, signals, pauses, concurrent runs and faults."""

import signal
from functools import partial

from prefect_flux_kontext.sandbox.settings import SandboxSettings
from tests.chaos.callback_batches import all_callback_faults, each_callback_fault
from tests.chaos.clocks import wrong_clocks
from tests.chaos.fault_sets import ALL, STOPPING, plan_fault_shares
from tests.chaos.trials import finish, print_now

SERVICE = SandboxSettings(
    mean=1.0,
    long_edge=16,
    fail_rate=0.02,
    requests_per_minute=1_000_000,
    callback_delay_scale=0.02,
)
TROUBLE = (
    "submit:lost-reply=0.01",
    "submit:closed=0.005",
    "submit:trouble-after=0.005",
    "submit:unavailable=0.01",
    "submit:reset=0.005",
    # Few, because each one slows the account limiter down for half a minute, by design.
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


def at_random(factory, line, rng, scale, *, batches, rows, kills):
    """Send `kill -9` at random moments, under network faults of every kind."""
    for number in range(max(1, round(batches * scale))):
        factory.inject_faults(rng, TROUBLE)
        batch = factory.create_batch(rows)
        for _ in range(kills):
            batch.run_and_kill(rng.uniform(0.15, 1.2))
        finish(line, batch, kills)
        print_now(f"    batch {number + 1}: {batch.kills} kills; so far {line}")


def each_fault(factory, line, rng, scale, *, kind, rows=500):
    """Run a batch under each fault of a kind, and kill it once."""
    for fault in [fault for fault in ALL if fault.startswith(f"{kind}:")]:
        # A refused key stays refused from some request on; the other faults occur at least once.
        planned = (
            [f"{fault}@10-"]
            if fault in STOPPING
            else [f"{fault}@5", *plan_fault_shares([fault], 0.05)]
        )
        factory.inject_faults(rng, planned)
        batch = factory.create_batch(round(rows * scale))
        batch.run_and_kill(rng.uniform(0.3, 6))
        occurrences = factory.service.active_faults.applied
        finish(line, batch, 1)
        print_now(f"    {fault} occurred {occurrences[fault]} times; so far {line}")


def all_faults(factory, line, rng, scale, *, batches=4, rows=500):
    """Run batches under all faults that do not stop a batch, and kill them at random."""
    together = [fault for fault in ALL if fault not in STOPPING]
    for number in range(batches):
        factory.inject_faults(rng, plan_fault_shares(together, 0.004))
        batch = factory.create_batch(round(rows * scale))
        for _ in range(8):
            batch.run_and_kill(rng.uniform(0.3, 3))
        finish(line, batch, 8)
        print_now(f"    batch {number + 1}: {batch.kills} kills; so far {line}")


def at_every_step(factory, line, _dice, scale, *, rows=2):
    """Send `kill -9` right before and right after each write, read, request and image."""
    kill_points = [
        (point, when, number)
        for point, last in STEPS.items()
        for number in range(1, last + 1)
        for when in ("before", "after")
    ]
    for kill_point in kill_points[:: max(1, round(1 / scale))]:
        batch = factory.create_batch(rows)
        batch.kills += batch.run(kill_point=kill_point).status == -signal.SIGKILL
        finish(line, batch, 1)


def together(factory, line, rng, scale, *, starts, rows=150):
    """Start several runs over one output at the same time, and kill all but one."""
    for _ in range(max(1, round(3 * scale))):
        factory.inject_faults(rng, TROUBLE)
        batch = factory.create_batch(rows)
        running = [batch.start_run() for _ in range(starts)]
        for victim in running[1:]:
            if victim.lives_for(rng.uniform(0.1, 1.5)):
                batch.kills += 1
            victim.kill()
        running[0].end()
        finish(line, batch, starts)


def stop_by_signal(factory, line, rng, scale):
    """Send SIGTERM and SIGINT at random moments."""
    for number in range(max(1, round(12 * scale))):
        batch = factory.create_batch(100)
        running = batch.start_run()
        running.lives_for(rng.uniform(0.3, 1.0))
        before = batch.accepted
        running.send((signal.SIGTERM, signal.SIGINT)[number % 2])
        running.end()
        if batch.accepted - before > 16:
            line.problems += 1
            print_now(f"     {batch.accepted - before} were billed after the signal")
        finish(line, batch, 1)


def lost_replies(factory, line, rng, scale):
    """Lose two of a hundred replies after the service has accepted; kill no process."""
    for _ in range(max(1, round(2 * scale))):
        factory.inject_faults(rng, ["submit:lost-reply=0.01", "submit:trouble-after=0.01"])
        finish(line, factory.create_batch(500), 0)


def sleepers(factory, line, rng, scale):
    """Suspend a run, let another take over, and continue the first."""
    for _ in range(max(1, round(4 * scale))):
        batch = factory.create_batch(60)
        sleeper = batch.start_run()
        sleeper.lives_for(rng.uniform(0.3, 0.8))
        sleeper.send(signal.SIGSTOP)
        other = batch.start_run()
        other.lives_for(3)
        sleeper.send(signal.SIGCONT)
        sleeper.end()
        other.end()
        finish(line, batch, 2)


SCENARIOS = {
    "each fault of a submit alone": partial(each_fault, kind="submit"),
    "each fault of a status request alone": partial(each_fault, kind="status"),
    "each fault of a download alone": partial(each_fault, kind="download"),
    "each fault of a task alone": partial(each_fault, kind="task"),
    "all these faults together": all_faults,
    "called back, each fault of a callback alone": each_callback_fault,
    "called back, all faults together": all_callback_faults,
    "clocks that are wrong and jump": wrong_clocks,
    "kills at random, faults of every kind": lambda *a: at_random(
        *a, batches=5, rows=500, kills=15
    ),
    "killed before and after each read, write, request, image": at_every_step,
    "two started together": lambda *a: together(*a, starts=2),
    "five started together": lambda *a: together(*a, starts=5),
    "SIGTERM and SIGINT at random": stop_by_signal,
    "frozen, overtaken by a second run, woken": sleepers,
    "2 % of replies lost after acceptance": lost_replies,
    "kills at random, ledger and images on S3 (moto)": lambda *a: at_random(
        *a, batches=2, rows=100, kills=6
    ),
    "killed at an eighth of the steps, on S3 (moto)": lambda factory, line, rng, scale: (
        at_every_step(factory, line, rng, scale / 8)
    ),
}
