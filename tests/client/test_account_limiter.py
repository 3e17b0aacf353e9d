"""What a 429 does to everybody, and who shares a governor with whom."""

import asyncio

import pytest

from prefect_flux_kontext.client.client import FluxKontextClient
from prefect_flux_kontext.client.limits import account as governor_module
from prefect_flux_kontext.client.limits.account import AccountLimiter
from prefect_flux_kontext.client.limits.rate import RateLimiter
from tests.support.clients import PROCESSING, Played, limited, make_client

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


@pytest.fixture
def longest_backoff(monkeypatch):
    """Backoff without dice: one second, doubled each time."""
    monkeypatch.setattr(governor_module, "jittered_backoff", lambda attempt: 2.0 ** (attempt - 1))


def make_governor():
    return AccountLimiter(requests_per_minute=10_000, concurrent_tasks=10)


async def wait_for_turn(governor):
    began = asyncio.get_running_loop().time()
    await governor.requests.take()
    return asyncio.get_running_loop().time() - began


async def refused_often(governor):
    """As many refusals in a row as say that the limit of requests was passed, and their pause."""
    for _ in range(5):
        governor.refused(None)
    await asyncio.sleep(100)
    governor._streak = 0
    governor.requests = RateLimiter(10_000)  # at full speed again


@pytest.mark.usefixtures("longest_backoff")
async def test_backoff_grows_until_somebody_is_heard():
    governor, waits = make_governor(), []
    await refused_often(governor)
    for _ in range(4):
        governor.refused(None)
        waits.append(await wait_for_turn(governor))
    governor.heard(after=0.3)
    governor.refused(None)
    waits.append(await wait_for_turn(governor))
    assert waits == pytest.approx([1, 2, 4, 8, 1])


@pytest.mark.usefixtures("longest_backoff")
@pytest.mark.parametrize("retry_after", [None, 1.0, 0.0])
async def test_simultaneous_refusals_are_one(retry_after):
    governor = make_governor()
    await refused_often(governor)
    for _ in range(50):
        governor.refused(retry_after)
    assert await wait_for_turn(governor) == pytest.approx(1)
    governor.refused(None)
    assert await wait_for_turn(governor) == pytest.approx(2)


@pytest.mark.usefixtures("longest_backoff")
async def test_a_refusal_of_what_was_sent_before_the_pause_is_the_same_one():
    governor = make_governor()
    await refused_often(governor)
    sent_at = asyncio.get_running_loop().time()
    await asyncio.sleep(0.2)
    governor.refused(None, sent_at=sent_at)
    await asyncio.sleep(5)  # the pause is over, the reply was slow
    governor.refused(None, sent_at=sent_at)
    assert await wait_for_turn(governor) < 0.1


async def test_the_longest_retry_after_counts():
    governor = make_governor()
    for seconds in (30.0, 60.0, 1.0, None):
        governor.refused(seconds)
    assert await wait_for_turn(governor) == pytest.approx(60)


async def test_a_pause_keeps_everybody_back():
    played = Played(PROCESSING, limited("40"), PROCESSING)
    async with make_client(transport=played) as client:
        await client.status("task_1")
        await asyncio.gather(*(client.status("task_1") for _ in range(200)))
    first_after = [time for time in played.times if time >= played.times[0] + 40]
    # Those that were on their way when the refusal came are out already.
    assert len([time for time in played.times if time < played.times[0] + 40]) < 200
    assert len(played.times) == 202
    assert first_after


async def test_a_run_of_refused_statuses_slows_requests_down_and_submits_do_not():
    governor = make_governor()
    spacing = governor.requests._spacing
    for _ in range(50):
        governor.refused(None, submit=True)
        await asyncio.sleep(100)
    assert governor.requests._spacing == spacing
    for _ in range(5):
        governor.refused(None)
        await asyncio.sleep(100)
    assert governor.requests._spacing == 2 * spacing


async def test_two_refusals_in_a_row_that_name_a_time_slow_requests_down():
    governor = make_governor()
    spacing = governor.requests.spacing
    governor.refused(5.0)
    await asyncio.sleep(100)
    assert governor.requests.spacing == spacing
    governor.refused(5.0)
    assert governor.requests.spacing == 2 * spacing


async def test_one_refusal_in_twenty_is_weather_and_holds_nobody_back():
    governor = make_governor()
    spacing = governor.requests._spacing
    for _ in range(50):
        for _ in range(19):
            governor.heard(after=0.3)
        await asyncio.sleep(100)
        governor.refused(None)
        assert await wait_for_turn(governor) == 0
    assert governor.requests._spacing == spacing


async def test_a_refused_submit_that_names_no_time_holds_no_status_back():
    governor = make_governor()
    for _ in range(50):
        governor.refused(None, submit=True)
    assert await wait_for_turn(governor) == 0
    governor.refused(40.0, submit=True)
    assert await wait_for_turn(governor) == pytest.approx(40)


def test_clients_of_one_account_share_a_governor():
    one = FluxKontextClient("key-1", base_url="http://service.test")
    same = FluxKontextClient(" key-1\n", base_url="http://service.test/")
    other_key = FluxKontextClient("key-2", base_url="http://service.test")
    other_place = FluxKontextClient("key-1", base_url="http://service.test:81")
    other_limits = FluxKontextClient(
        "key-1", base_url="http://service.test", requests_per_minute=60, concurrent_tasks=3
    )
    assert one.governor is same.governor
    governors = {client.governor for client in (one, other_key, other_place, other_limits)}
    assert len(governors) == 4
    assert other_limits.governor.limits == (60, 3)


def test_the_registry_of_governors_holds_no_key():
    FluxKontextClient("canary-key", base_url="http://service.test")
    assert "canary" not in repr(governor_module._limiters)
