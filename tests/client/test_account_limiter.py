"""What a 429 does to everybody, and who shares a limiter with whom."""

import asyncio

import pytest

from prefect_flux_kontext.client.client import FluxKontextClient
from prefect_flux_kontext.client.limits import account as account_module
from prefect_flux_kontext.client.limits.account import AccountLimiter
from prefect_flux_kontext.client.limits.rate import RateLimiter
from tests.support.clients import PROCESSING, Played, limited, make_client

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


@pytest.fixture
def longest_backoff(monkeypatch):
    """Backoff without dice: one second, doubled each time."""
    monkeypatch.setattr(account_module, "jittered_backoff", lambda attempt: 2.0 ** (attempt - 1))


def make_limiter():
    return AccountLimiter(requests_per_minute=10_000, concurrent_tasks=10)


async def wait_for_turn(limiter):
    began = asyncio.get_running_loop().time()
    await limiter.requests.acquire()
    return asyncio.get_running_loop().time() - began


async def refused_often(limiter):
    """As many refusals in a row as say that the limit of requests was passed, and their pause."""
    for _ in range(5):
        limiter.record_rejection(None)
    await asyncio.sleep(100)
    limiter._pauses_in_a_row = 0
    limiter.requests = RateLimiter(10_000)  # at full speed again


@pytest.mark.usefixtures("longest_backoff")
async def test_backoff_grows_until_somebody_is_heard():
    limiter, waits = make_limiter(), []
    await refused_often(limiter)
    for _ in range(4):
        limiter.record_rejection(None)
        waits.append(await wait_for_turn(limiter))
    limiter.record_success(round_trip=0.3)
    limiter.record_rejection(None)
    waits.append(await wait_for_turn(limiter))
    assert waits == pytest.approx([1, 2, 4, 8, 1])


@pytest.mark.usefixtures("longest_backoff")
@pytest.mark.parametrize("retry_after", [None, 1.0, 0.0])
async def test_simultaneous_refusals_are_one(retry_after):
    limiter = make_limiter()
    await refused_often(limiter)
    for _ in range(50):
        limiter.record_rejection(retry_after)
    assert await wait_for_turn(limiter) == pytest.approx(1)
    limiter.record_rejection(None)
    assert await wait_for_turn(limiter) == pytest.approx(2)


@pytest.mark.usefixtures("longest_backoff")
async def test_a_refusal_of_what_was_sent_before_the_pause_is_the_same_one():
    limiter = make_limiter()
    await refused_often(limiter)
    sent_at = asyncio.get_running_loop().time()
    await asyncio.sleep(0.2)
    limiter.record_rejection(None, sent_at=sent_at)
    await asyncio.sleep(5)  # the pause is over, the reply was slow
    limiter.record_rejection(None, sent_at=sent_at)
    assert await wait_for_turn(limiter) < 0.1


async def test_the_longest_retry_after_counts():
    limiter = make_limiter()
    for seconds in (30.0, 60.0, 1.0, None):
        limiter.record_rejection(seconds)
    assert await wait_for_turn(limiter) == pytest.approx(60)


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
    limiter = make_limiter()
    spacing = limiter.requests.spacing
    for _ in range(50):
        limiter.record_rejection(None, is_submit=True)
        await asyncio.sleep(100)
    assert limiter.requests.spacing == spacing
    for _ in range(5):
        limiter.record_rejection(None)
        await asyncio.sleep(100)
    assert limiter.requests.spacing == 2 * spacing


async def test_two_refusals_in_a_row_that_name_a_time_slow_requests_down():
    limiter = make_limiter()
    spacing = limiter.requests.spacing
    limiter.record_rejection(5.0)
    await asyncio.sleep(100)
    assert limiter.requests.spacing == spacing
    limiter.record_rejection(5.0)
    assert limiter.requests.spacing == 2 * spacing


async def test_one_refusal_in_twenty_is_weather_and_holds_nobody_back():
    limiter = make_limiter()
    spacing = limiter.requests.spacing
    for _ in range(50):
        for _ in range(19):
            limiter.record_success(round_trip=0.3)
        await asyncio.sleep(100)
        limiter.record_rejection(None)
        assert await wait_for_turn(limiter) == 0
    assert limiter.requests.spacing == spacing


async def test_a_refused_submit_that_names_no_time_holds_no_status_back():
    limiter = make_limiter()
    for _ in range(50):
        limiter.record_rejection(None, is_submit=True)
    assert await wait_for_turn(limiter) == 0
    limiter.record_rejection(40.0, is_submit=True)
    assert await wait_for_turn(limiter) == pytest.approx(40)


def test_clients_of_one_account_share_a_governor():
    one = FluxKontextClient("key-1", base_url="http://service.test")
    same = FluxKontextClient(" key-1\n", base_url="http://service.test/")
    other_key = FluxKontextClient("key-2", base_url="http://service.test")
    other_place = FluxKontextClient("key-1", base_url="http://service.test:81")
    other_limits = FluxKontextClient(
        "key-1", base_url="http://service.test", requests_per_minute=60, concurrent_tasks=3
    )
    assert one.limiter is same.limiter
    limiters = {client.limiter for client in (one, other_key, other_place, other_limits)}
    assert len(limiters) == 4
    assert other_limits.limiter.limits == (60, 3)


def test_the_registry_of_governors_holds_no_key():
    FluxKontextClient("canary-key", base_url="http://service.test")
    assert "canary" not in repr(account_module._limiters)
