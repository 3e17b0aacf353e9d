"""The scenarios of the large run: kills, signals, freezes, outages, concurrent runs and faults.

A scenario is a number of independent cases. Each runs one batch to its end, by chance that its
number decides, and checks it.
"""

import signal
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from prefect_flux_kontext.sandbox.faults.handlers import FAULTS
from prefect_flux_kontext.sandbox.faults.plan import FaultPlan
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from tests.chaos.callback_batches import all_callback_faults, each_callback_fault
from tests.chaos.clocks import CLOCK_CASES, wrong_clocks
from tests.chaos.fault_sets import ALL, STOPPING, plan_fault_shares
from tests.chaos.flow_runs import cancel_flow_run, kill_partitions, limit_time
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
OUTAGE = ("submit:trouble-after=0.1", "submit:unavailable=1", "status:unavailable=1")
"""Every POST gets a 5xx; a tenth of them were accepted."""

STEPS = {
    "create": 12,
    "replace": 3,
    "remove": 2,
    "read": 8,
    "image": 3,
    "request": 9,
    "download": 3,
}
_KILL_POINTS = [
    (point, when, number)
    for point, last in STEPS.items()
    for number in range(1, last + 1)
    for when in ("before", "after")
]
_S3_STEP = 4
"""Of the kill points, only each fourth is tried on S3."""

_POSTS_AT_A_TIME = 16


class Scenario(NamedTuple):
    """A number of cases, and the function that runs one of them.

    It gets the factory of batches, the totals to add to, a source of random numbers, and the
    number of the case from 0.
    """

    cases: int
    run: Callable


def at_random(factory, line, rng, _number, *, rows, kills):
    """Send `kill -9` at random moments, under network faults of every kind."""
    factory.inject_faults(rng, TROUBLE)
    batch = factory.create_batch(rows)
    for _ in range(kills):
        batch.run_and_kill(rng.uniform(0.15, 1.2))
    finish(line, batch, kills)


def each_fault(factory, line, rng, number, *, kind, rows=250, kills=3):
    """Run a batch under one fault of a kind, and kill it some times."""
    fault = _list_faults(kind)[number]
    # A refused key stays refused from some request on; the other faults occur at least once.
    planned = (
        [f"{fault}@10-"]
        if fault in STOPPING
        else [f"{fault}@5", *plan_fault_shares([fault], 0.05)]
    )
    factory.inject_faults(rng, planned)
    batch = factory.create_batch(rows)
    for _ in range(kills):
        batch.run_and_kill(rng.uniform(0.3, 4))
    finish(line, batch, kills)


def _list_faults(kind):
    return [fault for fault in ALL if fault.startswith(f"{kind}:")]


def all_faults(factory, line, rng, _number, *, rows=200, kills=10):
    """Run a batch under all faults that do not stop it, and kill it at random."""
    together = [fault for fault in ALL if fault not in STOPPING]
    factory.inject_faults(rng, plan_fault_shares(together, 0.004))
    batch = factory.create_batch(rows)
    for _ in range(kills):
        batch.run_and_kill(rng.uniform(0.3, 3))
    finish(line, batch, kills)


def outage(factory, line, rng, number, *, rows=300, kills=2):
    """Let the service fail for some seconds in the middle; every other batch is killed too."""
    batch = factory.create_batch(rows)
    if number % 2:
        for _ in range(kills):
            batch.run_and_kill(rng.uniform(0.15, 1.2))
    running = batch.start_run()
    running.lives_for(rng.uniform(0.3, 1.5))
    factory.inject_faults(rng, OUTAGE)
    ends = time.monotonic() + rng.uniform(2, 4)
    if number % 2:
        running.lives_for(1)
        running.kill()
        batch.kills += 1
        running = batch.start_run()
    running.lives_for(max(0, ends - time.monotonic()))
    factory.service.active_faults.change(FaultPlan())
    running.end()
    found = finish(line, batch, kills)
    runs = 1 + (kills + 1) * (number % 2)
    if found.unknown > runs * _POSTS_AT_A_TIME:
        line.problems += 1
        print_now(f"     {found.unknown} rows are unknown after an outage and {runs} runs")


def at_every_step(factory, line, _rng, number, *, step=1, rows=2):
    """Send `kill -9` right before or right after a write, read, request or image."""
    batch = factory.create_batch(rows)
    batch.kills += batch.run(kill_point=_KILL_POINTS[number * step]).status == -signal.SIGKILL
    finish(line, batch, 1)


def together(factory, line, rng, _number, *, starts, rows=150):
    """Start several runs over one output at the same time, and kill all but one."""
    factory.inject_faults(rng, TROUBLE)
    batch = factory.create_batch(rows)
    running = [batch.start_run() for _ in range(starts)]
    for victim in running[1:]:
        if victim.lives_for(rng.uniform(0.1, 1.5)):
            batch.kills += 1
        victim.kill()
    running[0].end()
    finish(line, batch, starts)


def stop_by_signal(factory, line, rng, number, *, signals=3):
    """Send SIGTERM or SIGINT at random moments."""
    batch = factory.create_batch(200)
    for _ in range(signals):
        running = batch.start_run()
        running.lives_for(rng.uniform(0.3, 1.0))
        before = batch.accepted
        batch.kills += running.lives_for(0)
        running.send((signal.SIGTERM, signal.SIGINT)[number % 2])
        running.end()
        if batch.accepted - before > _POSTS_AT_A_TIME:
            line.problems += 1
            print_now(f"     {batch.accepted - before} were billed after the signal")
    line.forbid_unknown(finish(line, batch, signals))


def lost_replies(factory, line, rng, _number):
    """Lose two of a hundred replies after the service has accepted; kill no process."""
    factory.inject_faults(rng, ["submit:lost-reply=0.01", "submit:trouble-after=0.01"])
    finish(line, factory.create_batch(500), 0)


def freeze(factory, line, rng, _number):
    """Suspend a run, let another take over, and continue the first."""
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


def freeze_in_namespace(factory, line, rng, number):
    """Freeze a run in a PID namespace for longer than four beats, while others take over."""
    batch = factory.create_batch(100, FLUX_KONTEXT_HEARTBEAT="0.3")
    budget = ("--budget-usd", "2.5") if number % 2 else ()
    sleeper = batch.start_run(*budget, namespace=True)
    batch.until(lambda: batch.accepted > rng.randrange(60), sleeper, 60)
    sleeper.send(signal.SIGSTOP)
    others = [batch.start_run(*budget, namespace=True) for _ in range(1 if budget else 2)]
    others[0].lives_for(rng.uniform(2, 5))
    sleeper.send(signal.SIGCONT)
    if rng.random() < 0.5:
        others[0].lives_for(rng.uniform(0, 1))
        others[0].kill()
        batch.kills += 1
        others.pop(0)
    for running in (sleeper, *others):
        running.end()
    if budget and batch.billed > 2.5:
        line.problems += 1
        print_now(f"     ${batch.billed} were billed of a budget of $2.5")
    finish(line, batch, 3)


def kill_in_namespaces(factory, line, rng, _number, *, kills=4):
    """Kill runs in PID namespaces of their own, as in containers, and start the next at once."""
    factory.inject_faults(rng, TROUBLE)
    batch = factory.create_batch(200, FLUX_KONTEXT_HEARTBEAT="0.3")
    for _ in range(kills):
        running = batch.start_run(namespace=True)
        before = batch.accepted
        batch.until_or_ended(lambda: batch.accepted > before + rng.randrange(60), running)  # noqa: B023
        batch.kills += running.lives_for(0)
        running.kill()
    finish(line, batch, kills)


SCENARIOS = {
    "each fault of a submit alone": Scenario(
        len(_list_faults("submit")), partial(each_fault, kind="submit")
    ),
    "each fault of a status request alone": Scenario(
        len(_list_faults("status")), partial(each_fault, kind="status")
    ),
    "each fault of a download alone": Scenario(
        len(_list_faults("download")), partial(each_fault, kind="download")
    ),
    "each fault of a task alone": Scenario(
        len(_list_faults("task")), partial(each_fault, kind="task")
    ),
    "all these faults together": Scenario(8, all_faults),
    "called back, each fault of a callback alone": Scenario(
        len(FAULTS["callback"]), each_callback_fault
    ),
    "called back, all faults together": Scenario(8, all_callback_faults),
    "clocks that are wrong and jump": Scenario(CLOCK_CASES, wrong_clocks),
    "kills at random, faults of every kind": Scenario(25, partial(at_random, rows=200, kills=14)),
    "killed before and after each read, write, request, image": Scenario(
        len(_KILL_POINTS), at_every_step
    ),
    "two started together": Scenario(10, partial(together, starts=2)),
    "five started together": Scenario(6, partial(together, starts=5)),
    "SIGTERM and SIGINT at random": Scenario(16, stop_by_signal),
    "frozen, overtaken by a second run, woken": Scenario(4, freeze),
    "frozen for more than four beats, in PID namespaces": Scenario(8, freeze_in_namespace),
    "killed in PID namespaces": Scenario(8, kill_in_namespaces),
    "2 % of replies lost after acceptance": Scenario(2, lost_replies),
    "an outage in the middle": Scenario(10, outage),
    "kills at random, ledger and images on S3 (moto)": Scenario(
        8, partial(at_random, rows=100, kills=8)
    ),
    "killed at a fourth of the steps, on S3 (moto)": Scenario(
        len(_KILL_POINTS) // _S3_STEP, partial(at_every_step, step=_S3_STEP)
    ),
    "flow runs with a time limit": Scenario(6, limit_time),
    "flow runs cancelled in Prefect": Scenario(6, cancel_flow_run),
    "flow runs in partitions, killed": Scenario(6, kill_partitions),
}
