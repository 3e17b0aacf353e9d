"""The tests' own clock: if it were wrong, tests of time would prove nothing."""

import asyncio
import time

import pytest

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


async def test_a_day_passes_at_once():
    loop, began = asyncio.get_running_loop(), time.monotonic()
    start = loop.time()
    await asyncio.sleep(86_400)
    assert 86_400 <= loop.time() - start < 86_401
    assert time.monotonic() - began < 60


async def test_the_clock_stands_still_while_a_thread_works():
    loop = asyncio.get_running_loop()
    start = loop.time()
    async with asyncio.timeout(5):
        assert await asyncio.to_thread(sum, range(1_000_000)) == 499_999_500_000
    assert loop.time() - start < 1


async def test_sleepers_wake_in_the_order_of_their_deadlines():
    woken = []

    async def sleeper(seconds):
        await asyncio.sleep(seconds)
        woken.append(seconds)

    await asyncio.gather(*(sleeper(seconds) for seconds in (30, 3, 20)))
    assert woken == [3, 20, 30]
