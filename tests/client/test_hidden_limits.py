"""The account's limits are lower than configured: all rows succeed with few rejections."""

import asyncio
import random

import httpx
import pytest

from prefect_flux_kontext.client.polling import PollingCadence, wait_until_ended
from prefect_flux_kontext.models import GenerationRequest
from prefect_flux_kontext.sandbox.app import Sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from tests.support.clients import make_client

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


class SlowTransport(httpx.ASGITransport):
    """Transport with a round trip of 0.1 to 0.5 s, so that many requests are in flight."""

    def __init__(self, app):
        super().__init__(app=app)
        self.rng = random.Random(1)

    async def handle_async_request(self, request):
        await asyncio.sleep(self.rng.uniform(0.05, 0.25))
        response = await super().handle_async_request(request)
        await asyncio.sleep(self.rng.uniform(0.05, 0.25))
        return response


async def run(rows, **hidden):
    """Run rows with the published limits against a service with hidden ones. Return its bill."""
    sandbox = Sandbox(SandboxSettings(mean=30, **hidden))
    cadence = PollingCadence(timeout=86_400)
    async with make_client(transport=SlowTransport(app=sandbox.app)) as client:

        async def row(number):
            task = await client.submit(GenerationRequest(prompt=f"row {number}"))
            return await wait_until_ended(client, task, cadence)

        results = await asyncio.gather(*(row(number) for number in range(rows)))
        assert client.limiter.tasks.running == 0
    assert len({result.task_id for result in results}) == rows
    return sandbox.service.bill()


def rejected_share(bill):
    rejected = sum(bill["submits_refused"].values())
    rejected += bill["statuses_refused"]
    sent = bill["accepted"] + sum(bill["submits_refused"].values()) + bill["status_requests"]
    return rejected / sent


@pytest.mark.parametrize(
    ("rows", "hidden", "most"),
    [
        pytest.param(300, {}, 0.0, id="none hidden"),
        pytest.param(100, {"slots": 3}, 0.15, id="3 tasks"),
        pytest.param(200, {"slots": 10}, 0.10, id="10 tasks"),
        pytest.param(400, {"slots": 100}, 0.10, id="100 tasks"),
        pytest.param(500, {"requests_per_minute": 600}, 0.25, id="600 requests"),
        pytest.param(100, {"requests_per_minute": 60}, 0.50, id="60 requests"),
        pytest.param(
            30, {"slots": 3, "requests_per_minute": 10}, 0.50, id="3 tasks and 10 requests"
        ),
    ],
)
async def test_all_rows_succeed_with_lower_hidden_limits(rows, hidden, most):
    bill = await run(rows, **hidden)
    share = rejected_share(bill)
    assert bill["accepted"] == rows
    assert share <= most, f"{share:.1%} of the requests were rejected: {bill}"


@pytest.mark.parametrize(
    ("hidden", "share"), [({"slots": 10}, 0.85), ({"slots": 10, "requests_per_minute": 60}, 0.72)]
)
async def test_low_hidden_limits_are_used(hidden, share):
    began = asyncio.get_running_loop().time()
    bill = await run(200, **hidden)
    took = asyncio.get_running_loop().time() - began
    assert took < 200 / 10 * 30 / share, f"{took:.0f} s for 200 rows in 10 slots: {bill}"


class RandomRejections(SlowTransport):
    """Transport that rejects one request in twenty, whatever the limits are."""

    async def handle_async_request(self, request):
        if self.rng.random() < 0.05:
            return httpx.Response(429, json={"code": 429, "message": "too many"})
        return await super().handle_async_request(request)


async def test_random_rejections_do_not_lower_the_limit_for_good():
    sandbox = Sandbox(SandboxSettings(mean=30))
    async with make_client(transport=RandomRejections(app=sandbox.app)) as client:

        async def row(number):
            task = await client.submit(GenerationRequest(prompt=f"row {number}"))
            return await wait_until_ended(client, task, PollingCadence(timeout=86_400))

        await asyncio.gather(*(row(number) for number in range(300)))
    bill = sandbox.service.bill()
    assert bill["accepted"] == 300
    assert bill["peak_running"] > 50, bill
