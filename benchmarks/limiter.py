"""The account limiter and the cadence against the account's limits, simulated in virtual time.

    python -m benchmarks.limiter
    python -m benchmarks.limiter --images 1000 --only steady drift
    python -m benchmarks.limiter --sizes --seeds 8    # accounts of 10 to 1,000 slots

The client's own code talks to the sandbox's service in memory, over a line that takes 0.05 to
0.25 s each way (with `--sizes` 2 to 6 ms), on an event loop whose clock jumps: seconds of CPU,
the same figures each time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from prefect_flux_kontext.batch.deferral import Deferral
from prefect_flux_kontext.batch.spending import Spending
from prefect_flux_kontext.batch.summary import BatchSummary
from prefect_flux_kontext.batch.waves import run_waves
from prefect_flux_kontext.client.polling import PollingCadence, wait_until_ended
from prefect_flux_kontext.models import GenerationRequest
from prefect_flux_kontext.sandbox.service import LatencyModel
from tests.support.simulated_account import CallbackPauses, SimulatedAccount, repeatable_simulation
from tests.support.virtual_time import VirtualTimeLoop

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from prefect_flux_kontext.batch.waves import Wave
    from prefect_flux_kontext.client.client import FluxKontextClient
    from prefect_flux_kontext.models import GenerationTask

    Wait = Callable[[FluxKontextClient, GenerationTask], Awaitable[object]]

MEAN, SPREAD = 30.0, 0.35
POSTS_AT_ONCE = 16
USUAL = LatencyModel(MEAN, SPREAD)


def drifting(since: float, rng: random.Random) -> float:
    """Tasks take three times as long from the 90th second to the 270th."""
    return USUAL.draw(rng) * (3 if int(since) in range(90, 270) else 1)


def sloping(since: float, rng: random.Random) -> float:
    """The mean climbs from 30 s to 90 s within three minutes, and back within three more."""
    return USUAL.draw(rng) * (1 + 2 * max(0.0, 1 - abs(since - 240) / 180))


def with_stragglers(_since: float, rng: random.Random) -> float:
    """One task in twenty takes five times as long."""
    return USUAL.draw(rng) * rng.choices((1, 5), (95, 5))[0]


def two_humps(_since: float, rng: random.Random) -> float:
    """Half of the tasks take about 12 s, half about 48 s."""
    return LatencyModel(rng.choice((12, 48)), 0.1).draw(rng)


def fast(_since: float, rng: random.Random) -> float:
    """About 8 s, long before the configured first look."""
    return LatencyModel(8, SPREAD).draw(rng)


def stalled(since: float, rng: random.Random) -> float:
    """Nothing ends from the 120th second to the 180th."""
    seconds = USUAL.draw(rng)
    begins, lasts = 120, 60
    return seconds + lasts if since < begins <= since + seconds else seconds


@dataclass(frozen=True)
class Scenario:
    """What the service is like, and how we ask it."""

    account: dict[str, Any] = field(default_factory=dict)
    interval: float | None = None  # a fixed cadence instead of ours
    called: bool = False
    images: int | None = None
    others: int = 0  # slots that another client of the account keeps busy
    knows_limits: bool = False  # the client's settings are the account's limits
    partitions: int = 1  # clients with an equal share of the limits and the images each
    line: tuple[float, float] = (0.05, 0.25)

    @property
    def slots(self) -> int:
        """Slots that are ours."""
        return self.account.get("slots", 1_000) - self.others

    @property
    def mean(self) -> float:
        """Mean seconds of a task."""
        return self.account.get("mean", MEAN)

    @property
    def cadence(self) -> PollingCadence:
        """The published cadence, 20 s and 3 s for tasks of 30 s, in proportion."""
        pace = self.mean / 30
        return PollingCadence(initial_delay=20 * pace, interval=3 * pace, timeout=86_400)


PARTITIONS = {
    f"{number} partitions" if number > 1 else "1 partition": Scenario(
        partitions=number, knows_limits=True, images=8_000
    )
    for number in (1, 2, 4, 8)
}

SCENARIOS = PARTITIONS | {
    "steady": Scenario(),
    "called back": Scenario(called=True),
    "fixed 0.5 s": Scenario(interval=0.5),
    "fixed 1 s": Scenario(interval=1),
    "fixed 5 s": Scenario(interval=5),
    "fixed 10 s": Scenario(interval=10),
    "suddenly 3x slower": Scenario({"curve": drifting}, images=8_000),
    "30 to 90 s and back": Scenario({"curve": sloping}, images=8_000),
    "5 % 5x slower": Scenario({"curve": with_stragglers}),
    "two humps": Scenario({"curve": two_humps}),
    "8 s": Scenario({"curve": fast}),
    "a stall of 60 s": Scenario({"curve": stalled}, images=8_000),
    "429 for 5 %": Scenario({"refuse": 0.05}),
    "another client": Scenario(others=500),
    "3 tasks, 10 a minute": Scenario({"slots": 3, "requests_per_minute": 10}, images=40),
    "10 tasks, 60 a minute": Scenario({"slots": 10, "requests_per_minute": 60}, images=200),
}


NEAR = (0.002, 0.006)
FLOOR_OF_MEAN = 0.1  # the interval, as a share of the mean


def sized(slots: int, images: int, mean: float, requests: int = 10_000) -> Scenario:
    """An account whose limits are known, on a short line."""
    account = {"slots": slots, "mean": mean, "requests_per_minute": requests}
    return Scenario(account, images=images, knows_limits=True, line=NEAR)


SIZES = {
    "10 slots": sized(10, 500, 10),
    "30 slots": sized(30, 900, 10),
    "100 slots": sized(100, 2_000, 10),
    "300 slots": sized(300, 4_500, 10),
    "1,000 slots": sized(1_000, 5_000, 30),
    "10 slots, 60 requests a minute": sized(10, 300, 30, 60),
}
"""Tasks of 10 s and a floor of 1 s; at 1,000 slots 30 s and 3 s, since 1,000 tasks of 10 s would
need 6,000 submits a minute."""


def limits_of(scenario: Scenario) -> tuple[float, float]:
    """The slots that a clairvoyant uses, and that polling at the floor with free requests does.

    A clairvoyant submits as early as no task can arrive before a slot is free. Polling sees an
    end at the next interval, hears of it one way later, and the next task arrives one more later.
    """
    rng = random.Random(0)
    curve = LatencyModel(scenario.mean, SPREAD)
    busy = knowing = polling = 0.0
    for _ in range(100_000):
        busy += curve.draw(rng)
        knowing += rng.uniform(*scenario.line) - scenario.line[0]
        polling += FLOOR_OF_MEAN * scenario.mean * rng.random()
        polling += rng.uniform(*scenario.line) + rng.uniform(*scenario.line)
    return busy / (busy + knowing), busy / (busy + polling)


def simulated(scenario: Scenario, seed: int, images: int | None = None) -> dict[str, float]:
    """Run a scenario in virtual time; returns its figures, and the seconds of CPU it took."""
    began = time.process_time()
    with repeatable_simulation(), asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        measured = runner.run(run(scenario, images or scenario.images or 4_000, seed))
    return measured | {"CPU": time.process_time() - began}


def sizes(seeds: int) -> list[dict[str, Any]]:
    """Medians of all sizes over seeds, with what a clairvoyant and what the floor reach."""
    found = []
    with ProcessPoolExecutor() as pool:
        for name, scenario in SIZES.items():
            runs = list(pool.map(partial(simulated, scenario), range(seeds)))
            called = simulated(replace(scenario, called=True), 0)
            knowing, polling = limits_of(scenario)
            found.append(
                {key: statistics.median(run[key] for run in runs) for key in runs[0]}
                | {
                    "account": name,
                    "slots": scenario.slots,
                    "requests a minute": scenario.account["requests_per_minute"],
                    "submits refused %": statistics.mean(run["submits refused %"] for run in runs),
                    "called back": called["slots used"],
                    "clairvoyant": knowing,
                    "floor": polling,
                }
            )
    return found


def print_table(columns: dict[str, str], rows: Iterable[dict[str, Any]]) -> None:
    """Print rows as a Markdown table; each column has its format."""
    print("|", " | ".join(columns), "|")
    print("|---|" + "---:|" * (len(columns) - 1))
    for row in rows:
        cells = (form.format(row[column]) for column, form in columns.items())
        print("|", " | ".join(cells), "|", flush=True)


async def run(scenario: Scenario, images: int, seed: int) -> dict[str, float]:
    """Run a scenario; returns its figures."""
    loop = asyncio.get_running_loop()
    account = SimulatedAccount(**scenario.account, line=scenario.line, seed=seed)
    posts = asyncio.Semaphore(POSTS_AT_ONCE)
    delays, ours = [], set()

    def wait(client: FluxKontextClient, task: GenerationTask) -> Awaitable[object]:
        if scenario.interval is None:
            pauses = CallbackPauses(account, task.task_id) if scenario.called else None
            return wait_until_ended(client, task, scenario.cadence, pauses)
        return fixed(client, task, scenario.interval)

    async def image(client: FluxKontextClient, number: int) -> None:
        request = GenerationRequest(prompt=f"image {number}")
        attempts = client.submit_attempts()
        while not attempts.is_over:
            async with await attempts.next_slot() as slot, posts:
                outcome = await slot.post(request)
        task = outcome.to_task(request)
        ours.add(task.task_id)
        await wait(client, task)
        delays.append(loop.time() - account.service._tasks[task.task_id].ready_at)  # noqa: SLF001

    async with asyncio.TaskGroup() as group:
        others = group.create_task(other_client(account, scenario.others))
        limits = {}
        if scenario.knows_limits:
            tasks, requests = scenario.slots, account.settings.requests_per_minute
            parts = scenario.partitions
            limits = {"tasks": tasks // parts, "requests": requests // parts}

        async def partition(first: int) -> None:
            client = account.client(**limits)

            async def wave(wave: Wave) -> BatchSummary:
                async def row(number: int) -> None:
                    await image(client, number)
                    wave._release_row()  # noqa: SLF001

                await asyncio.gather(*map(row, wave._rows))  # type: ignore[arg-type]  # noqa: SLF001
                return BatchSummary()

            session: Any = SimpleNamespace(
                output="",
                submitter=SimpleNamespace(stopped=None, spent=0.0, spending=Spending()),
                deferral=Deferral(on=False),
            )
            rows: Any = range(first, images, scenario.partitions)
            await run_waves(session, rows, wave, concurrent_tasks=client.limiter.tasks.slots)

        began = loop.time()
        await asyncio.gather(*map(partition, range(scenario.partitions)))
        took = loop.time() - began
        others.cancel()
    accepted = [task for task in account.tasks if task.task_id in ours]
    return figures(account, scenario, accepted, delays) | {"seconds": took}


def figures(
    account: SimulatedAccount, scenario: Scenario, tasks: list[Any], delays: list[float]
) -> dict[str, float]:
    """What the service saw, from the first filling of the slots to the last acceptance."""
    first = tasks[min(scenario.slots, len(tasks) // 2)].accepted_at
    last = tasks[-1].accepted_at
    busy = sum(
        min(task.ready_at, last) - max(task.accepted_at, first)
        for task in tasks
        if task.ready_at > first
    )
    accepted = sum(first < task.accepted_at <= last for task in tasks)
    bill = account.service.bill()
    refused = bill["submits_refused"]
    submits = len(tasks) + sum(refused.values())
    by_limits = sum(refused.values()) + bill["statuses_refused"]
    requests = submits + bill["status_requests"]
    quantiles = statistics.quantiles(delays, n=20)
    return {
        "slots used": busy / (last - first) / scenario.slots,
        "images a second": accepted / (last - first),
        "requests an image": (requests + account.refused_at_random) / len(tasks),
        "submits refused: slots": refused["slots"],
        "submits refused: requests": refused["requests"],
        "statuses refused": bill["statuses_refused"],
        "submits refused %": 100 * sum(refused.values()) / submits,
        "refused %": 100 * by_limits / requests,
        "unnoticed p50": quantiles[9],
        "unnoticed p95": quantiles[18],
        "peak running": bill["peak_running"],
        "peak a minute": bill["peak_requests_a_minute"],
    }


async def fixed(client: FluxKontextClient, task: GenerationTask, interval: float) -> None:
    """The polling loop of the known SDKs, kept within the account's limits by our limiter."""
    slots = client.limiter.tasks
    slots.watch(task.task_id)
    try:
        while True:
            await asyncio.sleep(interval)
            status = await client.status(task.task_id)
            if status.state in ("success", "failed"):
                return
    finally:
        slots.release_task(task.task_id)


async def other_client(account: SimulatedAccount, slots: int) -> None:
    """Keep a number of slots busy, and poll for each of its tasks every ten seconds."""
    client = account.client(tasks=max(1, slots))

    async def images(number: int) -> None:
        while True:
            request = GenerationRequest(prompt=f"another's image {number}")
            await fixed(client, await client.submit(request), 10)

    await asyncio.gather(*(images(number) for number in range(slots)))


def main() -> None:
    """Run the scenarios and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=4_000)
    parser.add_argument("--seed", type=int, default=0, help="other rng")
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of names")
    parser.add_argument("--json", action="store_true", help="all figures, one line a scenario")
    parser.add_argument("--sizes", action="store_true", help="accounts of all sizes instead")
    parser.add_argument("--seeds", type=int, default=8, help="runs of each size")
    options = parser.parse_args()
    if options.sizes:
        columns = {
            "account": "{}",
            "slots used": "{:.1%}",
            "floor": "{:.1%}",
            "clairvoyant": "{:.1%}",
            "called back": "{:.1%}",
            "submits refused %": "{:.3f}",
            "requests an image": "{:.2f}",
        }
        rows = sizes(options.seeds)
        if options.json:
            print("\n".join(map(json.dumps, rows)))
        else:
            print_table(columns, rows)
        return
    columns = {
        "scenario": "{}",
        "slots used": "{:.1%}",
        "images a second": "{:.1f}",
        "requests an image": "{:.2f}",
        "submits refused: slots": "{}",
        "submits refused: requests": "{}",
        "statuses refused": "{}",
        "refused %": "{:.3f}",
        "unnoticed p50": "{:.1f}",
        "unnoticed p95": "{:.1f}",
        "seconds": "{:.0f}",
        "CPU": "{:.1f}",
    }
    measured = (
        {"scenario": name, **simulated(scenario, options.seed, scenario.images or options.images)}
        for name, scenario in SCENARIOS.items()
        if name.startswith(tuple(options.only))
    )
    if options.json:
        for row in measured:
            print(json.dumps(row), flush=True)
    else:
        print_table(columns, measured)


if __name__ == "__main__":
    main()
