import asyncio

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from prefect_flux_kontext.sandbox.service import RequestWindow
from tests.sandbox.helpers import sandbox_client

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


async def test_submits_and_status_requests_share_one_window():
    async with sandbox_client(requests_per_minute=3) as sandbox:
        task_id = await sandbox.accepted()
        await sandbox.data(task_id)
        await sandbox.data(task_id)
        assert (await sandbox.status(task_id)).status_code == 429
        assert (await sandbox.submit()).status_code == 429


async def test_retry_after_is_when_the_request_fits():
    async with sandbox_client(requests_per_minute=1) as sandbox:
        await sandbox.accepted()
        await asyncio.sleep(10)
        refused = await sandbox.submit()
        assert refused.headers["retry-after"] == "50"
        assert refused.json()["code"] == 429
        await asyncio.sleep(int(refused.headers["retry-after"]))
        await sandbox.accepted()


async def test_the_window_slides_and_is_no_calendar_minute():
    async with sandbox_client(requests_per_minute=2) as sandbox:
        await sandbox.accepted()
        await asyncio.sleep(40)
        await sandbox.accepted()
        await asyncio.sleep(20)
        await sandbox.accepted()
        assert (await sandbox.submit()).status_code == 429
        assert (await sandbox.bill())["peak_requests_a_minute"] == 2


async def test_a_refused_request_does_not_count_against_the_window():
    async with sandbox_client(requests_per_minute=1) as sandbox:
        await sandbox.accepted()
        for _ in range(6):
            await asyncio.sleep(9)
            assert (await sandbox.submit()).status_code == 429
        await asyncio.sleep(6)
        await sandbox.accepted()


async def test_more_tasks_than_slots_are_refused_without_retry_after():
    async with sandbox_client(slots=2, mean=30, spread=0) as sandbox:
        await sandbox.accepted()
        await sandbox.accepted()
        refused = await sandbox.submit()
        assert refused.status_code == 429
        assert "retry-after" not in refused.headers
        await asyncio.sleep(30)
        await sandbox.accepted()
        bill = await sandbox.bill()
        assert bill["peak_running"] == 2
        assert bill["submits_refused"] == {"requests": 0, "slots": 1}
        assert bill["peak_requests_a_minute"] == 3


async def test_a_refused_submit_costs_nothing():
    async with sandbox_client(slots=1, requests_per_minute=2) as sandbox:
        await sandbox.accepted()
        for _ in range(5):
            assert (await sandbox.submit()).status_code == 429
        bill = await sandbox.bill()
        assert (bill["accepted"], bill["dollars"]) == (1, "0.030000")


async def test_limits_are_those_of_one_key():
    async with sandbox_client(slots=1, requests_per_minute=1) as sandbox:
        await sandbox.accepted(key="one")
        await sandbox.accepted(key="two")
        assert (await sandbox.submit(key="one")).status_code == 429
        bill = await sandbox.bill()
        assert (bill["peak_running"], bill["peak_requests_a_minute"]) == (1, 1)


@given(
    limit=st.integers(1, 5),
    pauses=st.lists(st.floats(0, 45, allow_nan=False) | st.just(60.0), max_size=60),
)
@example(limit=1, pauses=[1.1494953869192823, 60.0])
def test_window_admits_exactly_the_limit(limit, pauses):
    window, now, taken = RequestWindow(limit), 1_000.0, []
    for pause in pauses:
        now += pause
        inside = [stamp for stamp in taken if stamp > now - 60]
        assert (window.wait(now) > 0) == (len(inside) >= limit)
        if not window.wait(now):
            window.count(now)
            taken.append(now)
    apart = (later - first for first, later in zip(taken, taken[limit:], strict=False))
    assert all(seconds >= 60 - 1e-9 for seconds in apart)
