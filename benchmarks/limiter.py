"""The account limiter and the cadence against the account's limits, simulated in virtual time.

    python -m benchmarks.limiter
    python -m benchmarks.limiter --images 1000 --only steady drift

The client's own code talks to the sandbox's service in memory, over a line that takes 0.05 to
0.25 s each way, on an event loop whose clock jumps: seconds of CPU, the same figures each time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from prefect_flux_kontext.batch.deferral import Deferral
from prefect_flux_kontext.batch.spending import Spending
from prefect_flux_kontext.batch.summary import BatchSummary
from prefect_flux_kontext.batch.waves import run_waves
from prefect_flux_kontext.client.polling import PollingCadence, wait_until_ended
from prefect_flux_kontext.models import GenerationRequest
from prefect_flux_kontext.sandbox.tasks import LatencyModel
from tests.support.simulated_account import CallbackPauses, SimulatedAccount, repeatable_simulation
from tests.support.virtual_time import VirtualTimeLoop

if TYPE_CHECKING:
    import random
    from collections.abc import Awaitable, Callable

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

    @property
    def slots(self) -> int:
        """Slots that are ours."""
        return self.account.get("slots", 1_000) - self.others


SCENARIOS = {
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


async def run(scenario: Scenario, images: int, seed: int) -> dict[str, float]:
    """Run a scenario; returns its figures."""
    loop = asyncio.get_running_loop()
    account = SimulatedAccount(**scenario.account, seed=seed)
    posts = asyncio.Semaphore(POSTS_AT_ONCE)
    delays, ours = [], set()

    def wait(client: FluxKontextClient, task: GenerationTask) -> Awaitable[object]:
        if scenario.interval is None:
            pauses = CallbackPauses(account, task.task_id) if scenario.called else None
            return wait_until_ended(client, task, PollingCadence(timeout=86_400), pauses)
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
        client = account.client()

        async def wave(wave: Wave) -> BatchSummary:
            async def row(number: int) -> None:
                await image(client, number)
                wave._release_row()  # noqa: SLF001

            await asyncio.gather(*map(row, wave._rows))  # type: ignore[arg-type]  # noqa: SLF001
            return BatchSummary()

        began = loop.time()
        session: Any = SimpleNamespace(
            output="",
            submitter=SimpleNamespace(stopped=None, spent=0.0, spending=Spending()),
            deferral=Deferral(on=False),
        )
        rows: Any = range(images)
        await run_waves(session, rows, wave, concurrent_tasks=1_000)
        took = loop.time() - began
        others.cancel()
    tasks = [task for task in account.tasks if task.task_id in ours]
    return figures(account, scenario, tasks, delays) | {"seconds": took}


def figures(
    account: SimulatedAccount, scenario: Scenario, tasks: list[Any], delays: list[float]
) -> dict[str, float]:
    """What the service saw, after each slot was filled twice and before they ran empty."""
    first = tasks[min(2 * scenario.slots, len(tasks) // 2)].accepted_at
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
    options = parser.parse_args()
    columns = {
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
    if not options.json:
        print("| scenario |", " | ".join(columns), "|")
        print("|---|" + "---:|" * len(columns))
    for name, scenario in SCENARIOS.items():
        if not name.startswith(tuple(options.only)):
            continue
        began = time.process_time()
        with repeatable_simulation(), asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            measured = runner.run(run(scenario, scenario.images or options.images, options.seed))
        measured["CPU"] = time.process_time() - began
        if options.json:
            print(json.dumps({"scenario": name, **measured}), flush=True)
        else:
            cells = (form.format(measured[column]) for column, form in columns.items())
            print(f"| {name} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
