"""The account limiter: what a 429 does to all requests, and which clients share a limiter."""

import asyncio

import pytest

from prefect_flux_kontext.client.client import FluxKontextClient
from prefect_flux_kontext.client.limits import account as account_module
from prefect_flux_kontext.client.limits.account import AccountLimiter
from prefect_flux_kontext.client.limits.rate import RateLimiter
from tests.support.clients import PROCESSING, ScriptedTransport, make_client, rate_limited

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


@pytest.fixture
def fixed_backoff(monkeypatch):
    """Replace the random backoff by one second, doubled each time, and keep the request limit."""
    monkeypatch.setattr(RateLimiter, "meet_limit", lambda _self, **_sent: None)
    monkeypatch.setattr(account_module, "jittered_backoff", lambda attempt: 2.0 ** (attempt - 1))


def make_limiter():
    return AccountLimiter(requests_per_minute=10_000, concurrent_tasks=10)


async def measure_wait(limiter):
    began = asyncio.get_running_loop().time()
    await limiter.requests.acquire(has_priority=True)
    return asyncio.get_running_loop().time() - began


async def reject_repeatedly(limiter):
    """Record enough rejections for the request limit to count as exceeded, and wait."""
    for _ in range(5):
        limiter.record_rejection(None)
    await asyncio.sleep(100)
    limiter._pauses_in_a_row = 0


@pytest.mark.usefixtures("fixed_backoff")
async def test_backoff_grows_until_a_request_succeeds():
    limiter, waits = make_limiter(), []
    await reject_repeatedly(limiter)
    for _ in range(4):
        limiter.record_rejection(None)
        waits.append(await measure_wait(limiter))
    limiter.record_success(round_trip=0.3)
    limiter.record_rejection(None)
    waits.append(await measure_wait(limiter))
    assert waits == pytest.approx([1, 2, 4, 8, 1])


@pytest.mark.usefixtures("fixed_backoff")
@pytest.mark.parametrize("retry_after", [None, 1.0, 0.0])
async def test_simultaneous_rejections_count_once(retry_after):
    limiter = make_limiter()
    await reject_repeatedly(limiter)
    for _ in range(50):
        limiter.record_rejection(retry_after)
    assert await measure_wait(limiter) == pytest.approx(1)
    limiter.record_rejection(None)
    assert await measure_wait(limiter) == pytest.approx(2)


@pytest.mark.usefixtures("fixed_backoff")
async def test_rejection_of_a_request_sent_before_the_pause_counts_once():
    limiter = make_limiter()
    await reject_repeatedly(limiter)
    sent_at = asyncio.get_running_loop().time()
    await asyncio.sleep(0.2)
    limiter.record_rejection(None, sent_at=sent_at)
    await asyncio.sleep(5)  # the pause is over; the reply was slow
    limiter.record_rejection(None, sent_at=sent_at)
    assert await measure_wait(limiter) < 0.1


async def test_longest_retry_after_wins():
    limiter = make_limiter()
    for seconds in (30.0, 60.0, 1.0, None):
        limiter.record_rejection(seconds)
    assert await measure_wait(limiter) == pytest.approx(60)


async def test_pause_holds_back_all_requests():
    transport = ScriptedTransport(PROCESSING, rate_limited("40"), PROCESSING)
    async with make_client(transport=transport) as client:
        await client.status("task_1")
        await asyncio.gather(*(client.status("task_1") for _ in range(200)))
    first_after = [time for time in transport.times if time >= transport.times[0] + 40]
    # Requests in flight at the rejection are not held back.
    assert len([time for time in transport.times if time < transport.times[0] + 40]) < 200
    assert len(transport.times) == 202
    assert first_after


async def test_rejected_polls_lower_the_limit_but_submits_do_not():
    limiter = make_limiter()
    spacing = limiter.requests.spacing
    for _ in range(50):
        limiter.record_success(round_trip=0.3)
        limiter.record_rejection(None, is_submit=True)
        await asyncio.sleep(1)
    assert limiter.requests.spacing == spacing
    for _ in range(5):
        limiter.record_rejection(None)
    assert limiter.requests.spacing > 1


async def test_one_rejected_poll_with_retry_after_lowers_the_limit():
    limiter = make_limiter()
    for _ in range(30):
        limiter.record_success(round_trip=0.3)
    await asyncio.sleep(1)
    limiter.record_rejection(5.0)
    assert limiter.requests.spacing == pytest.approx(2, abs=0.2)


async def test_rejected_submit_at_a_known_limit_is_about_requests():
    limiter = make_limiter()
    for _ in range(60):
        limiter.record_success(round_trip=0.3)
    await asyncio.sleep(1)
    assert not limiter.is_request_limit(5.0)  # there may be too many tasks
    limiter.record_rejection(5.0)
    assert limiter.is_request_limit(5.0)
    assert not limiter.is_request_limit(None)
    await asyncio.sleep(60)
    limiter.record_success(round_trip=0.3)
    assert not limiter.is_request_limit(5.0)


async def test_one_random_rejection_in_twenty_causes_no_pause():
    limiter = make_limiter()
    spacing = limiter.requests.spacing
    for _ in range(50):
        for _ in range(19):
            limiter.record_success(round_trip=0.3)
        await asyncio.sleep(100)
        limiter.record_rejection(None)
        assert await measure_wait(limiter) == 0
    assert limiter.requests.spacing == spacing


async def test_rejected_submit_without_retry_after_causes_no_pause():
    limiter = make_limiter()
    for _ in range(50):
        limiter.record_rejection(None, is_submit=True)
    assert await measure_wait(limiter) == 0
    limiter.record_rejection(40.0, is_submit=True)
    assert await measure_wait(limiter) == pytest.approx(40)


def test_clients_of_one_account_share_a_limiter():
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


def test_limiter_registry_holds_no_key():
    FluxKontextClient("canary-key", base_url="http://service.test")
    assert "canary" not in repr(account_module._limiters)


async def test_resized_limiter_keeps_the_new_limits():
    limiter = make_limiter()
    tasks = [f"task-{number}" for number in range(6)]
    for task in tasks:
        await limiter.tasks.acquire()
        limiter.tasks.record_acceptance(task)
        limiter.tasks.watch(task)
    limiter.resize(requests_per_minute=60, concurrent_tasks=5)
    waiting = asyncio.create_task(limiter.tasks.acquire())
    await asyncio.sleep(10)
    limiter.tasks.release_task(tasks[0])
    await asyncio.sleep(10)
    assert (waiting.done(), limiter.tasks.count_busy()) == (False, 5)
    limiter.resize(requests_per_minute=120, concurrent_tasks=6)
    await asyncio.wait_for(waiting, 1)
    started_at = asyncio.get_running_loop().time()
    for _ in range(240):
        await limiter.requests.acquire()
    assert 115 < asyncio.get_running_loop().time() - started_at < 125


async def test_resized_limiter_stays_below_a_limit_that_was_met():
    limiter = make_limiter()
    limiter.requests.resize(600)
    for _ in range(30):
        limiter.requests.record_answer()
    limiter.requests.meet_limit(sent_at=asyncio.get_running_loop().time())
    spacing = limiter.requests.spacing
    limiter.requests.resize(300)
    assert limiter.requests.spacing == spacing
