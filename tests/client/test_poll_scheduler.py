"""When the next look at a task comes, and what it teaches."""

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
    """A limiter that has seen tasks which all took so many seconds."""
    limiter = AccountLimiter(requests_per_minute=10_000, concurrent_tasks=1_000)
    for _ in range(tasks if takes else 0):
        limiter.latency_model("pro").record_end(0, takes)
    return limiter


def schedule(limiter, *, age=0.0, request=REQUEST, has_callback=False, **cadence):
    submitted_at = utc_now() - timedelta(seconds=age)
    task = GenerationTask(task_id="task_1", request=request, submitted_at=submitted_at)
    return PollScheduler(limiter, task, PollingCadence(**cadence), has_callback=has_callback)


def still(state="processing"):
    return TaskStatus(task_id="task_1", state=state)


def ended(**told):
    return TaskStatus(task_id="task_1", state="success", **told)


def about(seconds, off=0.5):
    return pytest.approx(seconds, abs=off)


async def test_while_little_is_known_the_cadence_is_what_was_configured():
    limiter = make_limiter(takes=30, tasks=19)
    scheduler = schedule(limiter)
    assert scheduler.pause() == about(20)
    await asyncio.sleep(20)
    scheduler.record_poll(still())
    assert scheduler.pause() == 3


async def test_the_first_look_comes_when_the_task_has_likely_ended():
    assert schedule(make_limiter(takes=30)).pause() == about(33, off=2)
    assert schedule(make_limiter(takes=300)).pause() == about(303, off=20)


async def test_tasks_that_are_known_to_be_fast_are_looked_at_before_the_configured_delay():
    assert schedule(make_limiter(takes=5)).pause() == about(6.5, off=1)


async def test_looks_are_rarer_where_requests_are_scarce():
    limiter = make_limiter(takes=30)
    soon = schedule(limiter).pause()
    for number in range(1_500):
        limiter.tasks.watch(f"other_{number}")
    assert schedule(limiter).pause() > soon + 1


async def test_no_look_follows_another_sooner_than_the_interval():
    limiter = make_limiter(takes=30)
    scheduler = schedule(limiter, interval=7)
    await asyncio.sleep(scheduler.pause())
    scheduler.record_poll(still())
    assert scheduler.pause() >= 7


async def test_the_age_of_a_task_that_is_waited_for_later_counts():
    assert schedule(make_limiter(takes=30), age=25).pause() == about(8, off=2)
    assert schedule(make_limiter(takes=30), age=3_600).pause() == 0


async def test_a_straggler_is_looked_at_less_and_less_often_but_never_forgotten():
    scheduler = schedule(make_limiter(takes=30), timeout=10_000)
    pauses = []
    for _ in range(12):
        pauses.append(scheduler.pause())
        await asyncio.sleep(pauses[-1])
        scheduler.record_poll(still())
        assert scheduler.pause() <= scheduler.age / 3
    assert 5 < pauses[-1] < 600


async def test_the_last_look_comes_an_interval_before_the_deadline():
    scheduler = schedule(make_limiter(takes=300), timeout=100)
    assert scheduler.pause() == about(97)
    await asyncio.sleep(96)
    scheduler.record_poll(still())
    assert scheduler.pause() == 3


async def test_modes_are_learned_apart():
    limiter = make_limiter(takes=60)
    fast = REQUEST.model_copy(update={"mode": "max"})
    assert schedule(limiter, request=fast).pause() == about(20)
    assert schedule(limiter).pause() > 50


async def test_a_look_teaches_what_the_service_says_it_took():
    limiter = make_limiter()
    for _ in range(200):
        scheduler = schedule(limiter, initial_delay=20)
        await asyncio.sleep(20)
        scheduler.record_poll(ended(generation_seconds=8.0))
        scheduler.close()
    assert limiter.latency_model("pro").running_share(7) > 0.9
    assert limiter.latency_model("pro").running_share(9) < 0.1


async def test_a_task_that_has_called_teaches_nothing_for_those_that_run_do_not_call():
    limiter = make_limiter()
    schedule(limiter, has_callback=True).record_poll(ended(generation_seconds=10))
    assert limiter.latency_model("pro").ended_count == 0


async def test_a_task_that_was_seen_to_run_teaches_though_it_has_called():
    limiter = make_limiter()
    scheduler = schedule(limiter, has_callback=True)
    await asyncio.sleep(20)
    scheduler.record_poll(still())
    await asyncio.sleep(10)
    scheduler.record_poll(ended(generation_seconds=30))
    assert limiter.latency_model("pro").ended_count == 1


async def test_times_that_contradict_what_was_seen_are_not_believed():
    limiter = make_limiter()
    for _ in range(200):
        scheduler = schedule(limiter)
        await asyncio.sleep(20)
        scheduler.record_poll(still())
        await asyncio.sleep(5)
        scheduler.record_poll(ended(generation_seconds=0.5))
        scheduler.close()
    assert limiter.latency_model("pro").running_share(19) > 0.9
    assert limiter.latency_model("pro").running_share(26) < 0.1


async def test_looks_get_earlier_where_the_service_says_nothing_and_the_first_finds_the_end():
    limiter = make_limiter()
    for _ in range(200):
        scheduler = schedule(limiter)
        await asyncio.sleep(scheduler.pause())
        scheduler.record_poll(ended())
        scheduler.close()
    assert schedule(limiter).pause() < 12


async def test_when_the_wait_is_over_its_slot_is_free():
    limiter = make_limiter()
    scheduler = schedule(limiter)
    assert limiter.tasks.running == 1
    scheduler.close()
    assert limiter.tasks.running == 0
