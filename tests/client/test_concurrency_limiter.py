"""The concurrency limiter keeps the limit, and every waiter gets a slot."""

import asyncio
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefect_flux_kontext.client.limits.concurrency import ConcurrencyLimiter
from tests.support.virtual_time import run_in_virtual_time


class Crowd:
    """Rows that use a limiter as the client does, and a count of those that run."""

    def __init__(self, slots, results):
        self.limiter = ConcurrencyLimiter(slots)
        self.slots = slots
        self.results = iter(results)
        self.entered = 0
        self.most = 0

    async def row(self, number):
        limiter = self.limiter
        while True:
            await limiter.acquire()
            self.most = max(self.most, limiter.running)
            first, seconds = next(self.results, ("watched", 1.0))
            task_id, is_recorded = f"task_{number}", False
            try:
                await asyncio.sleep(seconds / 10)
                if first == "refused":
                    limiter.record_rejection()
                    is_recorded = True
                    continue
                if first == "lost":
                    return
                limiter.record_acceptance(task_id)
                is_recorded = True
            finally:
                if not is_recorded:
                    limiter.release()
            self.entered += 1
            if first == "watched":
                limiter.watch(task_id)
                try:
                    await asyncio.sleep(seconds)
                finally:
                    limiter.release_task(task_id)
            return


FATES = st.lists(
    st.tuples(
        st.sampled_from(["watched", "watched", "unwatched", "refused", "lost"]), st.floats(0, 90)
    ),
    max_size=60,
)


@settings(max_examples=100)
@given(st.integers(1, 12), st.integers(1, 60), FATES, st.sets(st.integers(0, 59)), st.data())
def test_limit_is_kept_and_every_waiter_gets_through(slots, rows, results, doomed, data):
    pauses = data.draw(st.lists(st.floats(0, 40), min_size=len(doomed), max_size=len(doomed)))

    async def main():
        crowd = Crowd(slots, results)
        tasks = [asyncio.create_task(crowd.row(number)) for number in range(rows)]
        for number, pause in zip(doomed, pauses, strict=True):
            await asyncio.sleep(pause)
            if number < rows:
                tasks[number].cancel()
        async with asyncio.timeout(86_400):
            await asyncio.gather(*tasks, return_exceptions=True)
        assert crowd.most <= slots
        await asyncio.sleep(61)
        await crowd.limiter.acquire()
        assert crowd.limiter.running == 1, "a slot was never freed"

    run_in_virtual_time(main())


def test_unwatched_task_frees_its_slot_after_a_minute():
    async def main():
        limiter, loop = ConcurrencyLimiter(1), asyncio.get_running_loop()
        await limiter.acquire()
        waiter = asyncio.create_task(limiter.acquire())
        await asyncio.sleep(5)
        limiter.record_acceptance("task_1")
        began = loop.time()
        await waiter
        assert loop.time() - began == pytest.approx(60)

    run_in_virtual_time(main())


def test_unwatched_task_frees_its_slot_while_many_wait():
    async def main():
        limiter, loop = ConcurrencyLimiter(2), asyncio.get_running_loop()
        for _ in range(2):
            await limiter.acquire()
        entered = []

        async def enter():
            await limiter.acquire()
            entered.append(loop.time() - began)

        waiters = [asyncio.create_task(enter()) for _ in range(4)]
        began = loop.time()
        await asyncio.sleep(5)
        limiter.record_acceptance("task_1")
        await asyncio.sleep(5)
        limiter.record_acceptance("task_2")
        waiters[0].cancel()  # only the first waiter has a timer
        await asyncio.sleep(600)
        assert entered == pytest.approx([65, 70])
        for waiter in waiters:
            waiter.cancel()

    run_in_virtual_time(main())


def test_waiter_cancelled_after_its_wake_up_passes_it_on():
    async def main():
        limiter = ConcurrencyLimiter(1)
        await limiter.acquire()
        first, second = (asyncio.create_task(limiter.acquire()) for _ in range(2))
        await asyncio.sleep(1)
        limiter.release()
        first.cancel()
        async with asyncio.timeout(1):
            await second

    run_in_virtual_time(main())


def test_unwatched_submits_proceed_at_the_pace_of_the_slots():
    async def main():
        limiter, loop, times = ConcurrencyLimiter(10), asyncio.get_running_loop(), []

        async def row(number):
            await limiter.acquire()
            times.append(loop.time())
            await asyncio.sleep(0.1)
            limiter.record_acceptance(f"task_{number}")

        await asyncio.gather(*(row(number) for number in range(100)))
        assert max(times) - min(times) < 9 * 61

    run_in_virtual_time(main())


def test_watched_task_holds_its_slot_until_released():
    async def main():
        limiter = ConcurrencyLimiter(1)
        await limiter.acquire()
        limiter.record_acceptance("task_1")
        limiter.watch("task_1")
        waiter = asyncio.create_task(limiter.acquire())
        await asyncio.sleep(3_600)
        assert not waiter.done()
        limiter.release_task("task_1")
        await waiter

    run_in_virtual_time(main())


def test_waiters_proceed_in_order():
    async def main():
        limiter, order = ConcurrencyLimiter(1), []
        await limiter.acquire()

        async def row(number):
            await limiter.acquire()
            order.append(number)
            limiter.release()

        rows = [asyncio.create_task(row(number)) for number in range(20)]
        await asyncio.sleep(200)  # long enough for several timers of each waiter
        limiter.release()
        await asyncio.gather(*rows)
        assert order == list(range(20))

    run_in_virtual_time(main())


def test_repeated_task_id_holds_one_slot():
    async def main():
        limiter = ConcurrencyLimiter(2)
        for _ in range(2):
            await limiter.acquire()
            limiter.record_acceptance("task_1")
        assert limiter.running == 1
        limiter.watch("task_1")
        limiter.release_task("task_1")
        limiter.release_task("task_1")
        assert limiter.running == 0

    run_in_virtual_time(main())


def test_waiter_of_a_closed_loop_does_not_block_others():
    limiter = ConcurrencyLimiter(1)

    async def take():
        await limiter.acquire()

    closed_loop = asyncio.new_event_loop()
    closed_loop.run_until_complete(take())
    abandoned = closed_loop.create_task(take())
    closed_loop.run_until_complete(asyncio.sleep(0))
    closed_loop.close()
    abandoned._log_destroy_pending = False

    async def main():  # in real time, as the closed loop
        waiter = asyncio.create_task(limiter.acquire())
        await asyncio.sleep(0)
        limiter.release()
        async with asyncio.timeout(10):
            await waiter

    asyncio.run(main())


def test_one_limiter_serves_several_threads():
    limiter, counted, lock = ConcurrencyLimiter(5), [], threading.Lock()

    async def row(name):
        await limiter.acquire()
        with lock:
            counted.append(limiter.running)
        await asyncio.sleep(0)
        limiter.record_acceptance(name)
        limiter.watch(name)
        await asyncio.sleep(0)
        limiter.release_task(name)

    async def rows(thread):
        async with asyncio.timeout(30):
            await asyncio.gather(*(row(f"{thread}/{number}") for number in range(50)))

    threads = [
        threading.Thread(target=lambda number=number: asyncio.run(rows(number)))
        for number in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(counted) == 200
    assert max(counted) <= 5
    assert limiter.running == 0
