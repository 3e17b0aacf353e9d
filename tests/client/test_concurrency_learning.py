"""The task gate learns: from refusals what the limit is, from the curve which tasks have ended."""

import asyncio

import pytest

from prefect_flux_kontext.client.limits import concurrency as task_gate
from prefect_flux_kontext.client.limits.concurrency import ConcurrencyLimiter
from prefect_flux_kontext.client.limits.latency_model import LatencyModel
from tests.support.virtual_time import on_virtual_time


async def fill(gate, name):
    """Take all the room there is; returns how much it was."""
    entered = 0
    while True:
        try:
            async with asyncio.timeout(0.001):
                await gate.enter()
        except TimeoutError:
            return entered
        gate.accepted(f"{name}_{entered}")
        gate.watched(f"{name}_{entered}")
        entered += 1


async def fill_watched(gate, curve, number):
    """So many tasks that are waited for."""
    for name in range(number):
        await gate.enter()
        gate.accepted(f"task_{name}")
        gate.watched(f"task_{name}", curve=curve)


async def refuse(gate, number):
    """So many POSTs under way at once are refused."""
    entered_at = asyncio.get_running_loop().time()
    for _ in range(number):
        await gate.enter()
    for _ in range(number):
        gate.refused(entered_at=entered_at)


def test_a_run_of_refused_submits_shrinks_the_gate_and_it_grows_again(monkeypatch):
    monkeypatch.setattr(task_gate, "jittered_backoff", lambda _attempt: 0.5)

    async def main():
        gate = ConcurrencyLimiter(100)
        await fill_watched(gate, None, 20)
        await refuse(gate, 7)
        await asyncio.sleep(0.6)  # in which nobody gets in
        assert await fill(gate, "shrunk") == 0
        for number in range(2):
            gate.ended(f"task_{number}")
        assert await fill(gate, "still") == 2
        await asyncio.sleep(31)
        gate.ended("task_2")
        assert await fill(gate, "grown") == 81
        assert gate.running == 100

    on_virtual_time(main())


def test_a_single_refused_submit_shrinks_nothing():
    async def main():
        gate = ConcurrencyLimiter(100)
        await fill_watched(gate, None, 20)
        await refuse(gate, 1)
        assert await fill(gate, "more") == 80

    on_virtual_time(main())


def test_a_single_refusal_where_a_run_of_them_came_before_shrinks_nothing(monkeypatch):
    monkeypatch.setattr(task_gate, "jittered_backoff", lambda _attempt: 0.5)

    async def main():
        gate = ConcurrencyLimiter(100)
        await fill_watched(gate, None, 20)
        await refuse(gate, 7)
        await asyncio.sleep(31)
        for number in range(40):
            gate.ended(f"task_{number}")
            await gate.enter()
            gate.accepted(f"task_{number + 20}")
            gate.watched(f"task_{number + 20}")
        gate.ended("task_40")
        await refuse(gate, 1)
        assert await fill(gate, "more") > 50

    on_virtual_time(main())


def test_nobody_gets_in_right_after_a_run_of_refusals():
    async def main():
        gate, loop = ConcurrencyLimiter(100), asyncio.get_running_loop()
        await refuse(gate, 7)
        began = loop.time()
        await gate.enter()
        assert 0.25 <= loop.time() - began <= 1

    on_virtual_time(main())


def known_curve():
    """Every task takes 30 s, as a thousand have shown."""
    curve = LatencyModel()
    for _ in range(1_000):
        curve.ended(0, 30)
    return curve


def test_a_task_that_has_likely_ended_makes_room():
    async def main():
        gate, curve = ConcurrencyLimiter(100), known_curve()
        await fill_watched(gate, curve, 100)
        await asyncio.sleep(25)
        assert await fill(gate, "early") == 0
        await asyncio.sleep(15)
        assert await fill(gate, "late") > 80
        assert gate.running > 180

    on_virtual_time(main())


def test_a_task_that_was_seen_to_run_makes_no_room():
    async def main():
        gate, curve = ConcurrencyLimiter(100), known_curve()
        await fill_watched(gate, curve, 100)
        await asyncio.sleep(100)
        for number in range(100):
            gate.runs(f"task_{number}", 100)
        assert await fill(gate, "more") == 0

    on_virtual_time(main())


def test_a_refusal_where_tasks_were_taken_to_have_ended_makes_the_gate_more_careful():
    async def main():
        gate, curve = ConcurrencyLimiter(100), known_curve()
        await fill_watched(gate, curve, 100)
        await asyncio.sleep(40)
        for number in range(10):
            await gate.enter()
            gate.accepted(f"more_{number}")
            gate.watched(f"more_{number}")
        await refuse(gate, 1)
        await asyncio.sleep(1)
        assert await fill(gate, "none") == 0

    on_virtual_time(main())


def test_a_task_accepted_after_a_refusal_proves_its_room():
    async def main():
        gate = ConcurrencyLimiter(100)
        for _ in range(8):
            await gate.enter()
        for _ in range(6):
            gate.refused()
        for number in range(2):
            gate.accepted(f"task_{number}")
        gate.ended("task_0")
        async with asyncio.timeout(1):
            await gate.enter()
        assert gate.running == 2

    on_virtual_time(main())


def test_the_first_posts_are_few_and_later_ones_more():
    async def main():
        gate, under_way, most = ConcurrencyLimiter(1_000), 0, []

        async def row(number):
            nonlocal under_way
            await gate.enter()
            under_way += 1
            most.append(under_way)
            await asyncio.sleep(0.3)
            under_way -= 1
            gate.accepted(f"task_{number}")

        rows = [asyncio.create_task(row(number)) for number in range(600)]
        await asyncio.sleep(0.1)
        assert max(most) == 8
        await asyncio.gather(*rows)
        assert max(most) == 32

    on_virtual_time(main())


def test_likely_ends_are_counted_for_when_a_submit_arrives_a_second_from_now_at_most():
    async def opens_after(way):
        gate, loop = ConcurrencyLimiter(100), asyncio.get_running_loop()
        for number in range(100):
            entered_at = loop.time()
            await gate.enter()
            await asyncio.sleep(way)
            gate.accepted(f"earlier_{number}", entered_at=entered_at)
            gate.ended(f"earlier_{number}")
        await fill_watched(gate, known_curve(), 100)
        filled_at = loop.time()
        await gate.enter()
        return loop.time() - filled_at

    async def main():
        at_once, slowly, held_up = [await opens_after(way) for way in (0, 1, 60)]
        assert at_once - slowly == pytest.approx(1, abs=0.3)
        assert held_up == pytest.approx(slowly, abs=0.3)

    on_virtual_time(main())
