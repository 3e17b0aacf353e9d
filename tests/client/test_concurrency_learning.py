"""The concurrency limiter learns the limit from rejections, and likely ends from latencies."""

import asyncio

import pytest

from prefect_flux_kontext.client.limits.concurrency import ConcurrencyLimiter
from prefect_flux_kontext.client.limits.latency_model import LatencyModel
from tests.support.virtual_time import run_in_virtual_time


async def fill(limiter, name):
    """Take all free slots and return their number."""
    entered = 0
    while True:
        try:
            async with asyncio.timeout(0.001):
                await limiter.acquire()
        except TimeoutError:
            return entered
        limiter.record_acceptance(f"{name}_{entered}")
        limiter.watch(f"{name}_{entered}")
        entered += 1


async def fill_watched(limiter, model, number):
    """Start this number of watched tasks."""
    for name in range(number):
        await limiter.acquire()
        limiter.record_acceptance(f"task_{name}")
        limiter.watch(f"task_{name}", model=model)


async def reject(limiter, number):
    """Reject this number of submits that are in flight together."""
    acquired_at = asyncio.get_running_loop().time()
    for _ in range(number):
        await limiter.acquire()
    for _ in range(number):
        limiter.record_rejection(acquired_at=acquired_at)


def test_repeated_rejections_lower_the_limit_for_a_while():
    async def main():
        limiter = ConcurrencyLimiter(100)
        await fill_watched(limiter, None, 20)
        await reject(limiter, 7)
        assert await fill(limiter, "shrunk") == 0
        for number in range(2):
            limiter.release_task(f"task_{number}")
        assert await fill(limiter, "still") == 2
        await asyncio.sleep(11)
        limiter.release_task("task_2")
        assert await fill(limiter, "grown") == 81
        assert limiter.running == 100

    run_in_virtual_time(main())


def test_single_rejection_does_not_lower_the_limit():
    async def main():
        limiter = ConcurrencyLimiter(100)
        await fill_watched(limiter, None, 20)
        await reject(limiter, 1)
        assert await fill(limiter, "more") == 80

    run_in_virtual_time(main())


def test_single_rejection_at_an_earlier_limit_does_not_lower_it():
    async def main():
        limiter = ConcurrencyLimiter(100)
        await fill_watched(limiter, None, 20)
        await reject(limiter, 7)
        await asyncio.sleep(31)
        for number in range(40):
            limiter.release_task(f"task_{number}")
            await limiter.acquire()
            limiter.record_acceptance(f"task_{number + 20}")
            limiter.watch(f"task_{number + 20}")
        limiter.release_task("task_40")
        await reject(limiter, 1)
        assert await fill(limiter, "more") > 50

    run_in_virtual_time(main())


def known_model():
    """Return a model of 1,000 tasks that took 30 s each."""
    model = LatencyModel()
    for _ in range(1_000):
        model.record_end(0, 30)
    return model


def test_task_that_has_likely_ended_frees_a_slot():
    async def main():
        limiter, model = ConcurrencyLimiter(100), known_model()
        await fill_watched(limiter, model, 100)
        await asyncio.sleep(25)
        assert await fill(limiter, "early") == 0
        await asyncio.sleep(15)
        assert await fill(limiter, "late") > 70
        assert limiter.running > 170

    run_in_virtual_time(main())


def test_task_seen_running_frees_no_slot():
    async def main():
        limiter, model = ConcurrencyLimiter(100), known_model()
        await fill_watched(limiter, model, 100)
        await asyncio.sleep(100)
        for number in range(100):
            limiter.record_running(f"task_{number}", 100)
        assert await fill(limiter, "more") == 0

    run_in_virtual_time(main())


def test_rejection_on_estimated_room_pauses_the_estimate():
    async def main():
        limiter, model = ConcurrencyLimiter(100), known_model()
        await fill_watched(limiter, model, 100)
        await asyncio.sleep(40)
        for number in range(10):
            await limiter.acquire()
            limiter.record_acceptance(f"more_{number}")
            limiter.watch(f"more_{number}")
        await reject(limiter, 1)
        await asyncio.sleep(9)
        assert await fill(limiter, "none") == 0
        await asyncio.sleep(2)
        assert await fill(limiter, "more") > 0

    run_in_virtual_time(main())


def test_task_accepted_after_a_rejection_raises_the_limit():
    async def main():
        limiter = ConcurrencyLimiter(100)
        for _ in range(8):
            await limiter.acquire()
        for _ in range(6):
            limiter.record_rejection()
        for number in range(2):
            limiter.record_acceptance(f"task_{number}")
        limiter.release_task("task_0")
        async with asyncio.timeout(1):
            await limiter.acquire()
        assert limiter.running == 2

    run_in_virtual_time(main())


def test_submits_in_flight_start_at_8_and_grow_to_32():
    async def main():
        limiter, in_flight, most = ConcurrencyLimiter(1_000), 0, []

        async def row(number):
            nonlocal in_flight
            await limiter.acquire()
            in_flight += 1
            most.append(in_flight)
            await asyncio.sleep(0.3)
            in_flight -= 1
            limiter.record_acceptance(f"task_{number}")

        rows = [asyncio.create_task(row(number)) for number in range(600)]
        await asyncio.sleep(0.1)
        assert max(most) == 8
        await asyncio.gather(*rows)
        assert max(most) == 32

    run_in_virtual_time(main())


def test_estimate_looks_ahead_by_a_round_trip():
    async def measure_wait(round_trip):
        limiter, loop = ConcurrencyLimiter(100), asyncio.get_running_loop()
        limiter.round_trip = round_trip
        await fill_watched(limiter, known_model(), 100)
        filled_at = loop.time()
        await limiter.acquire()
        return loop.time() - filled_at

    async def main():
        fast, slow = [await measure_wait(seconds) for seconds in (0, 1)]
        assert fast - slow == pytest.approx(1, abs=0.3)

    run_in_virtual_time(main())
