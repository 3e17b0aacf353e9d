"""The task limiter learns: from refusals what the limit is, from the model which tasks have ended."""

import asyncio

import pytest

from prefect_flux_kontext.client.limits import concurrency
from prefect_flux_kontext.client.limits.concurrency import ConcurrencyLimiter
from prefect_flux_kontext.client.limits.latency_model import LatencyModel
from tests.support.virtual_time import on_virtual_time


async def fill(limiter, name):
    """Take all the room there is; returns how much it was."""
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
    """So many tasks that are waited for."""
    for name in range(number):
        await limiter.acquire()
        limiter.record_acceptance(f"task_{name}")
        limiter.watch(f"task_{name}", model=model)


async def refuse(limiter, number):
    """So many POSTs under way at once are refused."""
    acquired_at = asyncio.get_running_loop().time()
    for _ in range(number):
        await limiter.acquire()
    for _ in range(number):
        limiter.record_rejection(acquired_at=acquired_at)


def test_a_run_of_refused_submits_shrinks_the_gate_and_it_grows_again(monkeypatch):
    monkeypatch.setattr(concurrency, "jittered_backoff", lambda _attempt: 0.5)

    async def main():
        limiter = ConcurrencyLimiter(100)
        await fill_watched(limiter, None, 20)
        await refuse(limiter, 7)
        await asyncio.sleep(0.6)  # in which nobody gets in
        assert await fill(limiter, "shrunk") == 0
        for number in range(2):
            limiter.release_task(f"task_{number}")
        assert await fill(limiter, "still") == 2
        await asyncio.sleep(31)
        limiter.release_task("task_2")
        assert await fill(limiter, "grown") == 81
        assert limiter.running == 100

    on_virtual_time(main())


def test_a_single_refused_submit_shrinks_nothing():
    async def main():
        limiter = ConcurrencyLimiter(100)
        await fill_watched(limiter, None, 20)
        await refuse(limiter, 1)
        assert await fill(limiter, "more") == 80

    on_virtual_time(main())


def test_a_single_refusal_where_a_run_of_them_came_before_shrinks_nothing(monkeypatch):
    monkeypatch.setattr(concurrency, "jittered_backoff", lambda _attempt: 0.5)

    async def main():
        limiter = ConcurrencyLimiter(100)
        await fill_watched(limiter, None, 20)
        await refuse(limiter, 7)
        await asyncio.sleep(31)
        for number in range(40):
            limiter.release_task(f"task_{number}")
            await limiter.acquire()
            limiter.record_acceptance(f"task_{number + 20}")
            limiter.watch(f"task_{number + 20}")
        limiter.release_task("task_40")
        await refuse(limiter, 1)
        assert await fill(limiter, "more") > 50

    on_virtual_time(main())


def test_nobody_gets_in_right_after_a_run_of_refusals():
    async def main():
        limiter, loop = ConcurrencyLimiter(100), asyncio.get_running_loop()
        await refuse(limiter, 7)
        began = loop.time()
        await limiter.acquire()
        assert 0.25 <= loop.time() - began <= 1

    on_virtual_time(main())


def known_model():
    """Every task takes 30 s, as a thousand have shown."""
    model = LatencyModel()
    for _ in range(1_000):
        model.record_end(0, 30)
    return model


def test_a_task_that_has_likely_ended_makes_room():
    async def main():
        limiter, model = ConcurrencyLimiter(100), known_model()
        await fill_watched(limiter, model, 100)
        await asyncio.sleep(25)
        assert await fill(limiter, "early") == 0
        await asyncio.sleep(15)
        assert await fill(limiter, "late") > 80
        assert limiter.running > 180

    on_virtual_time(main())


def test_a_task_that_was_seen_to_run_makes_no_room():
    async def main():
        limiter, model = ConcurrencyLimiter(100), known_model()
        await fill_watched(limiter, model, 100)
        await asyncio.sleep(100)
        for number in range(100):
            limiter.record_running(f"task_{number}", 100)
        assert await fill(limiter, "more") == 0

    on_virtual_time(main())


def test_a_refusal_where_tasks_were_taken_to_have_ended_makes_the_gate_more_careful():
    async def main():
        limiter, model = ConcurrencyLimiter(100), known_model()
        await fill_watched(limiter, model, 100)
        await asyncio.sleep(40)
        for number in range(10):
            await limiter.acquire()
            limiter.record_acceptance(f"more_{number}")
            limiter.watch(f"more_{number}")
        await refuse(limiter, 1)
        await asyncio.sleep(1)
        assert await fill(limiter, "none") == 0

    on_virtual_time(main())


def test_a_task_accepted_after_a_refusal_proves_its_room():
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

    on_virtual_time(main())


def test_the_first_posts_are_few_and_later_ones_more():
    async def main():
        limiter, under_way, most = ConcurrencyLimiter(1_000), 0, []

        async def row(number):
            nonlocal under_way
            await limiter.acquire()
            under_way += 1
            most.append(under_way)
            await asyncio.sleep(0.3)
            under_way -= 1
            limiter.record_acceptance(f"task_{number}")

        rows = [asyncio.create_task(row(number)) for number in range(600)]
        await asyncio.sleep(0.1)
        assert max(most) == 8
        await asyncio.gather(*rows)
        assert max(most) == 32

    on_virtual_time(main())


def test_likely_ends_are_counted_for_when_a_submit_arrives_a_second_from_now_at_most():
    async def opens_after(way):
        limiter, loop = ConcurrencyLimiter(100), asyncio.get_running_loop()
        for number in range(100):
            acquired_at = loop.time()
            await limiter.acquire()
            await asyncio.sleep(way)
            limiter.record_acceptance(f"earlier_{number}", acquired_at=acquired_at)
            limiter.release_task(f"earlier_{number}")
        await fill_watched(limiter, known_model(), 100)
        filled_at = loop.time()
        await limiter.acquire()
        return loop.time() - filled_at

    async def main():
        at_once, slowly, held_up = [await opens_after(way) for way in (0, 1, 60)]
        assert at_once - slowly == pytest.approx(1, abs=0.3)
        assert held_up == pytest.approx(slowly, abs=0.3)

    on_virtual_time(main())
