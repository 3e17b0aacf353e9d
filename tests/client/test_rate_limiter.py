"""The rate limiter: no sliding minute exceeds the limit, and every waiter gets through."""

import asyncio
import itertools
import threading

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prefect_flux_kontext.client.limits.rate import RateLimiter
from tests.support.virtual_time import run_in_virtual_time

# The loop's clock starts at a million, so its floats are exact to about a nanosecond.
CLOCK_TOLERANCE_SECONDS = 1e-6


def fullest_minute(times):
    """Return the largest number of requests in any 60 s, without their end."""
    times, most, first = sorted(times), 0, 0
    for last, time in enumerate(times):
        while times[first] <= time - 60 + CLOCK_TOLERANCE_SECONDS:
            first += 1
        most = max(most, last - first + 1)
    return most


LIMITS = st.integers(1, 20) | st.integers(1, 20_000)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("arrive"), st.integers(1, 400)),
        st.tuples(st.just("sleep"), st.floats(0, 100)),
        st.tuples(st.just("pause"), st.floats(0, 400)),
        st.tuples(st.just("cancel"), st.integers(0, 300)),
        st.tuples(st.just("reject"), st.just(0)),
        st.tuples(st.just("answer"), st.integers(1, 300)),
    ),
    min_size=1,
    max_size=12,
)


async def play(limit, steps):
    """Use a limiter as the steps say; return when each got through, and the pauses."""
    loop, limiter = asyncio.get_running_loop(), RateLimiter(limit)
    through, pauses, waiting = [], [], []

    async def take(number):
        await limiter.acquire(has_priority=number % 3 > 0)
        through.append(loop.time())

    for what, how in steps:
        if what == "arrive":
            waiting += [asyncio.create_task(take(number)) for number in range(how)]
            await asyncio.sleep(0)
        elif what == "sleep":
            await asyncio.sleep(how)
        elif what == "pause":
            limiter.pause(how)
            pauses.append((loop.time(), loop.time() + how))
        elif what == "cancel":
            for task in waiting[::3][:how]:
                task.cancel()
        elif what == "reject":
            limiter.meet_limit(sent_at=loop.time())
        else:
            for _ in range(how):
                limiter.record_answer()
    ended = await asyncio.gather(*waiting, return_exceptions=True)
    cancelled = sum(isinstance(error, asyncio.CancelledError) for error in ended)
    assert len(through) == len(waiting) - cancelled, "a waiter never got through"
    return through, pauses


@settings(max_examples=100)
@given(LIMITS, STEPS)
@example(103, [("reject", 0), ("pause", 1.0), ("answer", 100), ("arrive", 3)])
def test_no_sliding_minute_exceeds_the_limit(limit, steps):
    through, pauses = run_in_virtual_time(play(limit, steps))
    assert fullest_minute(through) <= limit
    for start, end in pauses:
        assert not [
            time
            for time in through
            if start + CLOCK_TOLERANCE_SECONDS < time < end - CLOCK_TOLERANCE_SECONDS
        ]


@settings(max_examples=15)
@given(st.integers(20, 20_000))
def test_limit_is_used_when_there_is_demand(limit):
    number = min(2 * limit, 2_000)
    through, _ = run_in_virtual_time(play(limit, [("arrive", number)]))
    ideal = (number - 1) * 60 / limit
    assert max(through) - min(through) <= ideal / 0.9


@pytest.mark.parametrize(("limit", "burst"), [(1, 1), (2, 2), (60, 2), (1_000, 20), (10_000, 200)])
def test_only_submits_may_use_a_small_burst(limit, burst):
    async def count_immediate(*, is_submit):
        limiter, counted = RateLimiter(limit), 0
        async with asyncio.TaskGroup() as group:

            async def take():
                nonlocal counted
                await limiter.acquire(has_priority=is_submit)
                counted += 1

            tasks = [group.create_task(take()) for _ in range(burst + 5)]
            await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
        return counted

    assert run_in_virtual_time(count_immediate(is_submit=True)) in (burst - 1, burst)  # rounding
    assert run_in_virtual_time(count_immediate(is_submit=False)) == 1


def test_submit_after_a_poll_is_not_delayed():
    async def main():
        loop, limiter, waits = asyncio.get_running_loop(), RateLimiter(60), []
        polls = [asyncio.create_task(limiter.acquire()) for _ in range(20)]
        for poll in polls[:5]:
            await poll  # it found that its task has ended
            began = loop.time()
            await limiter.acquire(has_priority=True)
            waits.append(loop.time() - began)
        for poll in polls:
            poll.cancel()
        return waits

    assert run_in_virtual_time(main()) == [0] * 5


def test_no_burst_follows_a_pause():
    steps = [("arrive", 300), ("pause", 30.0), ("arrive", 300)]
    through, ((_, end),) = run_in_virtual_time(play(10_000, steps))
    after = [time for time in through if time > end - CLOCK_TOLERANCE_SECONDS]
    gaps = [later - earlier for earlier, later in itertools.pairwise(after)]
    assert len(after) > 300
    assert min(gaps) > 60 / 10_000 - CLOCK_TOLERANCE_SECONDS


def test_submits_go_first_and_each_kind_in_order():
    async def main():
        limiter, order = RateLimiter(60), []
        await limiter.acquire()

        async def take(name, *, first):
            await limiter.acquire(has_priority=first)
            order.append(name)

        waiting = [asyncio.create_task(take(f"poll {n}", first=False)) for n in range(3)]
        await asyncio.sleep(0.1)
        waiting += [asyncio.create_task(take(f"submit {n}", first=True)) for n in range(3)]
        await asyncio.sleep(0.1)
        waiting.pop(1).cancel()
        await asyncio.gather(*waiting)
        assert order == ["submit 0", "submit 1", "submit 2", "poll 0", "poll 2"]

    run_in_virtual_time(main())


def test_waiter_of_a_closed_loop_does_not_block_others():
    limiter = RateLimiter(6_000)
    closed_loop = asyncio.new_event_loop()

    async def take_many(number):
        await asyncio.gather(*(limiter.acquire() for _ in range(number)))

    abandoned = closed_loop.create_task(take_many(200))
    closed_loop.run_until_complete(asyncio.sleep(0.01))
    closed_loop.close()
    abandoned._log_destroy_pending = False

    async def main():  # in real time, as the closed loop
        async with asyncio.timeout(10):
            await limiter.acquire()

    asyncio.run(main())


def test_short_pause_does_not_end_a_long_one():
    through, _ = run_in_virtual_time(play(600, [("pause", 60.0), ("pause", 1.0), ("arrive", 5)]))
    assert min(through) >= 1_000_060 - CLOCK_TOLERANCE_SECONDS


async def use_up(limiter, number):
    """Send this number of requests, all of which are answered; return the seconds it took."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    for _ in range(number):
        await limiter.acquire()
        limiter.record_answer()
    return loop.time() - began


def test_rejection_lowers_the_limit_to_the_last_minute():
    async def main():
        loop, limiter = asyncio.get_running_loop(), RateLimiter(6_000)
        await use_up(limiter, 60)
        limiter.meet_limit(sent_at=loop.time())
        for _ in range(5):  # in flight at the rejection
            limiter.meet_limit(sent_at=loop.time() - 1)
        return limiter.spacing

    assert run_in_virtual_time(main()) == pytest.approx(1.04, abs=0.01)


def test_lowered_limit_grows_again_while_it_is_used():
    async def main():
        limiter = RateLimiter(6_000)
        await use_up(limiter, 60)
        limiter.meet_limit(sent_at=asyncio.get_running_loop().time())
        held = await use_up(limiter, 9)
        await use_up(limiter, 1_000)
        return held, await use_up(limiter, 1_000)

    held, grown = run_in_virtual_time(main())
    assert held > 8
    assert grown < 100


@pytest.mark.parametrize("limit", [1, 7, 60, 10_000])
def test_rejected_limiter_never_stops(limit):
    steps = [("reject", 0)] * 50 + [("arrive", 5)]
    through, _ = run_in_virtual_time(play(limit, steps))
    assert max(through) - min(through) <= 5 * 62


def test_one_limiter_serves_several_threads():
    limiter, through, lock = RateLimiter(60_000), [], threading.Lock()

    async def take_many():
        loop = asyncio.get_running_loop()
        for _ in range(100):
            await limiter.acquire()
            with lock:
                through.append(loop.time())

    threads = [threading.Thread(target=lambda: asyncio.run(take_many())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(through) == 400
    assert fullest_minute(through) <= 60_000
