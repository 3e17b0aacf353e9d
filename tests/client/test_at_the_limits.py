"""The limiter and the poll scheduler together, against an account with exact limits."""

import asyncio

import pytest

from prefect_flux_kontext.client.polling import PollingCadence, wait_until_ended
from prefect_flux_kontext.models import GenerationRequest
from prefect_flux_kontext.sandbox.service import LatencyModel
from tests.support.simulated_account import CallbackPauses, SimulatedAccount, repeatable_simulation

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

SLOTS = 200
USUAL = LatencyModel(30, 0.35)


@pytest.fixture(autouse=True)
def _repeatable():
    with repeatable_simulation():
        yield


async def run(images, *, callbacks=False, **options):
    """Run images and return the account, its bill and the share of busy slots."""
    account = SimulatedAccount(slots=SLOTS, requests_per_minute=2_000, **options)
    client = account.client(tasks=SLOTS, requests=2_000)

    async def image(number):
        task = await client.submit(GenerationRequest(prompt=f"image {number}"))
        pauses = CallbackPauses(account, task.task_id) if callbacks else None
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


def count_rejections(bill):
    return sum(bill["submits_refused"].values()) + bill["statuses_refused"]


async def test_polling_keeps_slots_busy_within_the_limits():
    _, bill, busy = await run(1_600)
    assert busy > 0.93
    assert bill["status_requests"] < 4 * 1_600
    assert count_rejections(bill) <= 3
    assert bill["peak_requests_a_minute"] <= 2_000


async def test_tasks_started_together_are_not_assumed_to_have_ended():
    _, bill, busy = await run(1_600, line=(0.005, 0.03))
    assert busy > 0.9
    assert count_rejections(bill) <= 8


async def test_callbacks_keep_slots_busy_with_two_requests_an_image():
    _, bill, busy = await run(1_600, callbacks=True)
    assert busy > 0.97
    assert bill["status_requests"] == 1_600
    assert count_rejections(bill) == 0


async def test_sudden_slowdown_causes_few_rejections():
    def curve(since, rng):
        return USUAL.draw(rng) * (3 if since > 90 else 1)

    account, bill, busy = await run(1_600, curve=curve)
    assert account.since() > 300
    assert busy > 0.75
    assert count_rejections(bill) < 0.02 * (1_600 + bill["status_requests"])


async def test_random_rejections_cost_only_part_of_the_speed():
    account, _, busy = await run(1_600, refuse=0.05)
    assert account.refused_at_random > 100
    assert busy > 0.6
