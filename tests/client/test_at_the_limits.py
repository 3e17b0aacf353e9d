"""The governor and the looks together, against an account that counts exactly."""

import asyncio

import pytest

from prefect_flux_kontext.client.polling import PollingCadence, wait_until_ended
from prefect_flux_kontext.models import GenerationRequest
from prefect_flux_kontext.sandbox.tasks import LatencyModel
from tests.support.simulated_account import CalledBack, SimulatedAccount, the_same_each_time

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

SLOTS = 200
USUAL = LatencyModel(30, 0.35)


@pytest.fixture(autouse=True)
def _the_same_figures_each_time():
    with the_same_each_time():
        yield


async def run(images, *, called=False, **how):
    """Run images; returns the account, its bill and the share of the slots that was busy."""
    account = SimulatedAccount(slots=SLOTS, requests_per_minute=2_000, **how)
    client = account.client(tasks=SLOTS, requests=2_000)

    async def image(number):
        task = await client.submit(GenerationRequest(prompt=f"image {number}"))
        pauses = CalledBack(account, task.task_id) if called else None
        await wait_until_ended(client, task, PollingCadence(timeout=86_400), pauses)

    await asyncio.gather(*(image(number) for number in range(images)))
    tasks = account.tasks
    assert len(tasks) == images
    assert client.limiter.tasks.running == 0
    first, last = tasks[2 * SLOTS].accepted_at, tasks[-1].accepted_at
    busy = sum(
        min(task.ready_at, last) - max(task.accepted_at, first)
        for task in tasks
        if task.ready_at > first
    )
    return account, account.service.bill(), busy / (last - first) / SLOTS


def refused(bill):
    return sum(bill["submits_refused"].values()) + bill["statuses_refused"]


async def test_the_slots_are_busy_at_three_requests_an_image_and_nearly_none_is_refused():
    _, bill, busy = await run(1_600)
    assert busy > 0.9
    assert bill["status_requests"] < 2.3 * 1_600
    assert refused(bill) <= 25
    assert bill["peak_requests_a_minute"] <= 2_000


async def test_tasks_that_all_began_together_on_a_short_line_are_not_thought_to_have_ended():
    _, bill, busy = await run(1_600, line=(0.005, 0.03))
    assert busy > 0.9
    assert refused(bill) <= 8


async def test_when_called_back_the_slots_are_busy_at_two_requests_an_image_and_none_is_refused():
    _, bill, busy = await run(1_600, called=True)
    assert busy > 0.97
    assert bill["status_requests"] == 1_600
    assert refused(bill) == 0


async def test_tasks_that_suddenly_take_three_times_as_long_cost_few_refusals():
    def curve(since, dice):
        return USUAL.draw(dice) * (3 if since > 90 else 1)

    account, bill, busy = await run(1_600, curve=curve)
    assert account.since() > 300
    assert busy > 0.75
    assert refused(bill) < 0.02 * (1_600 + bill["status_requests"])


async def test_refusals_at_random_cost_a_part_of_the_speed_and_no_more():
    account, _, busy = await run(1_600, refuse=0.05)
    assert account.refused_at_random > 100
    assert busy > 0.6
