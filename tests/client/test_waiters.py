"""Waiters of the running loop are woken immediately, others by the thread of their loop."""

import asyncio
import threading

import pytest

from prefect_flux_kontext.client.limits.waiters import wake


@pytest.mark.anyio
async def test_waiter_of_the_running_loop_is_woken_immediately():
    loop = asyncio.get_running_loop()
    waiter = loop.create_future()
    wake(waiter, loop)
    wake(waiter, loop)
    assert waiter.done()


@pytest.mark.anyio
async def test_waiter_of_another_loop_is_woken_by_its_thread():
    made = threading.Event()
    others = []

    async def wait():
        others.append((asyncio.get_running_loop().create_future(), asyncio.get_running_loop()))
        made.set()
        await others[0][0]

    other = threading.Thread(target=asyncio.run, args=[wait()])
    other.start()
    await asyncio.to_thread(made.wait)
    wake(*others[0])
    await asyncio.to_thread(other.join)
    assert others[0][0].done()
    with pytest.raises(RuntimeError, match="closed"):
        wake(*others[0])


def test_wake_works_without_a_running_loop():
    loop = asyncio.new_event_loop()
    waiter = loop.create_future()
    wake(waiter, loop)  # no loop runs here
    loop.run_until_complete(waiter)
    loop.close()
    assert waiter.done()
