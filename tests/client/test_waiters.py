"""Waiters of the running loop are woken immediately, others by the thread of their loop."""

import asyncio
import threading

import pytest

from prefect_flux_kontext.client.limits.waiters import Waiter


@pytest.mark.anyio
async def test_waiter_of_the_running_loop_is_woken_immediately():
    waiter = Waiter()
    waiter.wake()
    waiter.wake()
    await asyncio.wait_for(waiter.sleep(3_600), 60)


@pytest.mark.anyio
async def test_waiter_sleeps_again_once_prepared():
    waiter = Waiter()
    waiter.wake()
    waiter.prepare()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(waiter.sleep(3_600), 0.01)


@pytest.mark.anyio
async def test_waiter_of_another_loop_is_woken_by_its_thread():
    made = threading.Event()
    others = []

    async def wait():
        others.append(Waiter())
        made.set()
        await others[0].sleep(3_600)

    other = threading.Thread(target=asyncio.run, args=[wait()])
    other.start()
    await asyncio.to_thread(made.wait)
    others[0].wake()
    await asyncio.to_thread(other.join)
    assert others[0].is_stranded
    with pytest.raises(RuntimeError, match="closed"):
        others[0].wake()


def test_wake_works_without_a_running_loop():
    loop = asyncio.new_event_loop()

    async def create():
        return Waiter()

    waiter = loop.run_until_complete(create())
    waiter.wake()  # no loop runs here
    loop.run_until_complete(waiter.sleep(3_600))
    loop.close()
    assert waiter.is_stranded
