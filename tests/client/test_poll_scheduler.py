"""The poll scheduler: when the next poll of a task is due, and what it teaches the model."""

import asyncio
from datetime import timedelta

import pytest

from prefect_flux_kontext.client.limits.account import AccountLimiter
from prefect_flux_kontext.client.limits.poll_scheduler import PollScheduler
from prefect_flux_kontext.client.polling import PollingCadence
from prefect_flux_kontext.models import GenerationTask, TaskStatus, utc_now
from tests.support.clients import REQUEST

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


def make_limiter(*, takes=None, tasks=200):
    """Create a limiter that has seen `tasks` tasks of `takes` seconds each."""
    limiter = AccountLimiter(requests_per_minute=10_000, concurrent_tasks=1_000)
    for _ in range(tasks if takes else 0):
        limiter.latency_model("pro").record_end(0, takes)
    return limiter


def schedule(limiter, *, age=0.0, request=REQUEST, has_callback=False, **cadence):
    submitted_at = utc_now() - timedelta(seconds=age)
    task = GenerationTask(task_id="task_1", request=request, submitted_at=submitted_at)
    return PollScheduler(limiter, task, PollingCadence(**cadence), has_callback=has_callback)


def running(state="processing"):
    return TaskStatus(task_id="task_1", state=state)


def ended(**fields):
    return TaskStatus(task_id="task_1", state="success", **fields)


def about(seconds, off=0.5):
    return pytest.approx(seconds, abs=off)


async def test_configured_cadence_applies_while_little_is_known():
    limiter = make_limiter(takes=30, tasks=29)
    scheduler = schedule(limiter)
    assert scheduler.pause() == about(20)
    await asyncio.sleep(20)
    scheduler.record_poll(running())
    assert scheduler.pause() == 3


async def test_first_poll_comes_when_the_task_has_likely_ended():
    assert schedule(make_limiter(takes=30)).pause() == about(29, off=1)
    assert schedule(make_limiter(takes=300)).pause() > 60


async def test_fast_tasks_are_polled_before_the_initial_delay():
    assert schedule(make_limiter(takes=5)).pause() == about(5, off=0.5)


async def test_every_interval_is_used_once_an_end_is_likely():
    limiter = make_limiter()
    for seconds in range(10, 50):
        for _ in range(5):
            limiter.latency_model("pro").record_end(0, seconds)
    scheduler = schedule(limiter)
    await asyncio.sleep(30)
    scheduler.record_poll(running())
    assert scheduler.pause() == 3


async def test_round_trip_counts_towards_the_interval():
    limiter = make_limiter(takes=10)
    limiter.tasks.round_trip = 0.5
    scheduler = schedule(limiter)
    await asyncio.sleep(9.5)
    scheduler.record_poll(running())
    assert scheduler.pause() == 2.5


async def test_polls_are_rarer_when_requests_are_scarce():
    limiter = make_limiter(takes=30)
    soon = schedule(limiter).pause()
    for number in range(1_500):
        limiter.tasks.watch(f"other_{number}")
    assert schedule(limiter).pause() > soon + 1


async def test_polls_are_at_least_an_interval_apart():
    limiter = make_limiter(takes=30)
    scheduler = schedule(limiter, interval=7)
    await asyncio.sleep(scheduler.pause())
    scheduler.record_poll(running())
    assert scheduler.pause() >= 7


async def test_age_of_an_older_task_counts():
    assert schedule(make_limiter(takes=30), age=25).pause() == about(4, off=1)
    assert schedule(make_limiter(takes=30), age=3_600).pause() == 0


async def test_slow_task_is_polled_ever_more_rarely():
    scheduler = schedule(make_limiter(takes=30), timeout=10_000)
    pauses = []
    for _ in range(20):
        pauses.append(scheduler.pause())
        await asyncio.sleep(pauses[-1])
        scheduler.record_poll(running())
        assert scheduler.pause() <= scheduler.age / 3
    assert 5 < pauses[-1] < 600


async def test_last_poll_comes_an_interval_before_the_deadline():
    scheduler = schedule(make_limiter(takes=300, tasks=1_500), timeout=100)
    assert scheduler.pause() == about(97)
    await asyncio.sleep(96)
    scheduler.record_poll(running())
    assert scheduler.pause() == 3


async def test_modes_are_learned_separately():
    limiter = make_limiter(takes=60)
    fast = REQUEST.model_copy(update={"mode": "max"})
    assert schedule(limiter, request=fast).pause() == about(20)
    assert schedule(limiter).pause() > 40


async def test_reported_generation_time_is_learned():
    limiter = make_limiter()
    for _ in range(200):
        scheduler = schedule(limiter, initial_delay=20)
        await asyncio.sleep(20)
        scheduler.record_poll(ended(generation_seconds=8.0))
        scheduler.close()
    assert limiter.latency_model("pro").running_share(7) > 0.9
    assert limiter.latency_model("pro").running_share(9) < 0.1


async def test_callback_before_the_first_poll_is_not_learned():
    limiter = make_limiter()
    schedule(limiter, has_callback=True).record_poll(ended(generation_seconds=10))
    assert limiter.latency_model("pro").ended_count == 0


async def test_callback_after_a_poll_is_learned():
    limiter = make_limiter()
    scheduler = schedule(limiter, has_callback=True)
    await asyncio.sleep(20)
    scheduler.record_poll(running())
    await asyncio.sleep(10)
    scheduler.record_poll(ended(generation_seconds=30))
    assert limiter.latency_model("pro").ended_count == 1


async def test_reported_time_is_limited_by_what_polls_showed():
    limiter = make_limiter()
    for _ in range(200):
        scheduler = schedule(limiter)
        await asyncio.sleep(20)
        scheduler.record_poll(running())
        await asyncio.sleep(5)
        scheduler.record_poll(ended(generation_seconds=0.5))
        scheduler.close()
    assert limiter.latency_model("pro").running_share(19) > 0.9
    assert limiter.latency_model("pro").running_share(26) < 0.1


async def test_polls_get_earlier_without_reported_times():
    limiter = make_limiter()
    for _ in range(200):
        scheduler = schedule(limiter)
        await asyncio.sleep(scheduler.pause())
        scheduler.record_poll(ended())
        scheduler.close()
    assert schedule(limiter).pause() < 12


async def test_close_frees_the_slot():
    limiter = make_limiter()
    scheduler = schedule(limiter)
    assert limiter.tasks.running == 1
    scheduler.close()
    assert limiter.tasks.running == 0
