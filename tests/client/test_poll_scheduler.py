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


def make_governor(*, takes=None, tasks=200):
    """A governor that has seen tasks which all took so many seconds."""
    governor = AccountLimiter(requests_per_minute=10_000, concurrent_tasks=1_000)
    for _ in range(tasks if takes else 0):
        governor.curve("pro").ended(0, takes)
    return governor


def look_at(governor, *, age=0.0, request=REQUEST, called=False, **cadence):
    submitted_at = utc_now() - timedelta(seconds=age)
    task = GenerationTask(task_id="task_1", request=request, submitted_at=submitted_at)
    return PollScheduler(governor, task, PollingCadence(**cadence), called=called)


def still(state="processing"):
    return TaskStatus(task_id="task_1", state=state)


def ended(**told):
    return TaskStatus(task_id="task_1", state="success", **told)


def about(seconds, off=0.5):
    return pytest.approx(seconds, abs=off)


async def test_while_little_is_known_the_cadence_is_what_was_configured():
    governor = make_governor(takes=30, tasks=19)
    looks = look_at(governor)
    assert looks.pause() == about(20)
    await asyncio.sleep(20)
    looks.looked(still())
    assert looks.pause() == 3


async def test_the_first_look_comes_when_the_task_has_likely_ended():
    assert look_at(make_governor(takes=30)).pause() == about(33, off=2)
    assert look_at(make_governor(takes=300)).pause() == about(303, off=20)


async def test_tasks_that_are_known_to_be_fast_are_looked_at_before_the_configured_delay():
    assert look_at(make_governor(takes=5)).pause() == about(6.5, off=1)


async def test_looks_are_rarer_where_requests_are_scarce():
    governor = make_governor(takes=30)
    soon = look_at(governor).pause()
    for number in range(1_500):
        governor.tasks.watched(f"other_{number}")
    assert look_at(governor).pause() > soon + 1


async def test_no_look_follows_another_sooner_than_the_interval():
    governor = make_governor(takes=30)
    looks = look_at(governor, interval=7)
    await asyncio.sleep(looks.pause())
    looks.looked(still())
    assert looks.pause() >= 7


async def test_the_age_of_a_task_that_is_waited_for_later_counts():
    assert look_at(make_governor(takes=30), age=25).pause() == about(8, off=2)
    assert look_at(make_governor(takes=30), age=3_600).pause() == 0


async def test_a_straggler_is_looked_at_less_and_less_often_but_never_forgotten():
    looks = look_at(make_governor(takes=30), timeout=10_000)
    pauses = []
    for _ in range(12):
        pauses.append(looks.pause())
        await asyncio.sleep(pauses[-1])
        looks.looked(still())
        assert looks.pause() <= looks.age / 3
    assert 5 < pauses[-1] < 600


async def test_the_last_look_comes_an_interval_before_the_deadline():
    looks = look_at(make_governor(takes=300), timeout=100)
    assert looks.pause() == about(97)
    await asyncio.sleep(96)
    looks.looked(still())
    assert looks.pause() == 3


async def test_modes_are_learned_apart():
    governor = make_governor(takes=60)
    fast = REQUEST.model_copy(update={"mode": "max"})
    assert look_at(governor, request=fast).pause() == about(20)
    assert look_at(governor).pause() > 50


async def test_a_look_teaches_what_the_service_says_it_took():
    governor = make_governor()
    for _ in range(200):
        looks = look_at(governor, initial_delay=20)
        await asyncio.sleep(20)
        looks.looked(ended(generation_seconds=8.0))
        looks.over()
    assert governor.curve("pro").running_share(7) > 0.9
    assert governor.curve("pro").running_share(9) < 0.1


async def test_a_task_that_has_called_teaches_nothing_for_those_that_run_do_not_call():
    governor = make_governor()
    look_at(governor, called=True).looked(ended(generation_seconds=10))
    assert governor.curve("pro").known == 0


async def test_a_task_that_was_seen_to_run_teaches_though_it_has_called():
    governor = make_governor()
    looks = look_at(governor, called=True)
    await asyncio.sleep(20)
    looks.looked(still())
    await asyncio.sleep(10)
    looks.looked(ended(generation_seconds=30))
    assert governor.curve("pro").known == 1


async def test_times_that_contradict_what_was_seen_are_not_believed():
    governor = make_governor()
    for _ in range(200):
        looks = look_at(governor)
        await asyncio.sleep(20)
        looks.looked(still())
        await asyncio.sleep(5)
        looks.looked(ended(generation_seconds=0.5))
        looks.over()
    assert governor.curve("pro").running_share(19) > 0.9
    assert governor.curve("pro").running_share(26) < 0.1


async def test_looks_get_earlier_where_the_service_says_nothing_and_the_first_finds_the_end():
    governor = make_governor()
    for _ in range(200):
        looks = look_at(governor)
        await asyncio.sleep(looks.pause())
        looks.looked(ended())
        looks.over()
    assert look_at(governor).pause() < 12


async def test_when_the_wait_is_over_its_slot_is_free():
    governor = make_governor()
    looks = look_at(governor)
    assert governor.tasks.running == 1
    looks.over()
    assert governor.tasks.running == 0
