"""The deferred wait, on a clock that jumps."""

import asyncio
from datetime import datetime, timedelta

import httpx
import pytest

from prefect_flux_kontext.client.polling import PollingCadence, wait_until_ended
from prefect_flux_kontext.errors import (
    GenerationFailedError,
    GenerationTimeoutError,
    NotFoundError,
    RefusedError,
)
from prefect_flux_kontext.models import GenerationTask, utc_now
from tests.support.clients import PROCESSING, REQUEST, SUCCESS, Played, limited, make_client, ok

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


def refusal(code):
    return (code, {"code": code, "message": "no"})


async def wait(played, *, age=0.0, tasks=1_000, **cadence):
    """Wait for a task of some age; the times of the looks, from now, are on `played`."""
    began = asyncio.get_running_loop().time()
    task = GenerationTask(
        task_id="task_1", request=REQUEST, submitted_at=utc_now() - timedelta(seconds=age)
    )
    async with make_client(transport=played, tasks=tasks) as client:
        try:
            return await wait_until_ended(client, task, PollingCadence(**cadence))
        finally:
            assert client.limiter.tasks.running == 0
            played.looks = [time - began for time in played.times]
            played.waited = asyncio.get_running_loop().time() - began


def about(seconds):
    # The age of a task comes from the calendar, which goes on for real.
    return pytest.approx(seconds, abs=0.5)


async def test_the_first_look_comes_after_20_s_and_then_one_every_3_s():
    played = Played(PROCESSING, PROCESSING, ok({"state": "pending"}), SUCCESS)
    result = await wait(played)
    assert played.looks == about([20, 23, 26, 29])
    assert result.result_urls == ["http://service.test/1.jpg"]
    assert result.request == REQUEST
    assert result.task_id == "task_1"


async def test_the_cadence_is_what_it_was_set_to():
    played = Played(PROCESSING, PROCESSING, SUCCESS)
    await wait(played, initial_delay=2, interval=0.5)
    assert played.looks == about([2, 2.5, 3])


@pytest.mark.parametrize(("age", "first"), [(12, 8), (20, 0), (86_400, 0), (-3_600, 20)])
async def test_the_first_look_counts_from_the_submit(age, first):
    played = Played(PROCESSING, SUCCESS)
    await wait(played, age=age)
    assert played.looks == about([first, first + 3])


async def test_a_submit_time_without_a_time_zone_is_utc():
    naive = utc_now().replace(tzinfo=None)
    assert isinstance(naive, datetime)
    async with make_client(transport=Played(SUCCESS)) as client:
        task = GenerationTask(task_id="task_1", submitted_at=naive)
        assert await wait_until_ended(client, task, PollingCadence())


async def test_the_deadline_is_kept_and_the_task_named():
    played = Played(PROCESSING)
    with pytest.raises(GenerationTimeoutError, match="task_1") as caught:
        await wait(played, timeout=100)
    assert played.waited == about(100)
    assert played.looks[-1] < 100
    assert caught.value.task_id == "task_1"
    assert caught.value.__context__ is None


@pytest.mark.parametrize(
    "stuck", [None, limited(), limited("60"), httpx.ReadError(""), refusal(503)]
)
async def test_the_deadline_is_kept_whatever_the_service_does(stuck):
    played = Played(stuck)
    with pytest.raises(GenerationTimeoutError):
        await wait(played, timeout=100)
    assert played.waited == about(100)
    assert played.requests


@pytest.mark.parametrize(
    "trouble",
    [
        refusal(500),
        refusal(502),
        (200, {"code": 503, "message": "busy"}),
        httpx.ReadError(""),
        httpx.ReadTimeout(""),
        httpx.ConnectError(""),
        httpx.RemoteProtocolError(""),
        httpx.Response(200, text="<html>"),
        httpx.Response(502, text="<html>"),
        httpx.Response(302, headers={"Location": "http://elsewhere.test/"}),
        ok({"taskId": "task_2", "state": "success"}),
        ok({"state": "success", "resultJson": "{}"}),
        ok(None),
        limited(),
        limited("5"),
    ],
)
async def test_what_may_pass_is_asked_again(trouble):
    played = Played(PROCESSING, *[trouble] * 7, SUCCESS)
    result = await wait(played)
    assert result.result_urls
    assert len(played.requests) == 9


async def test_a_service_in_trouble_is_asked_less_and_less_often():
    played = Played(refusal(500))
    with pytest.raises(GenerationTimeoutError):
        await wait(played, timeout=1_000)
    pauses = [b - a for a, b in zip(played.looks, played.looks[1:], strict=False)]
    assert all(3 <= pause <= 30 for pause in pauses)
    assert all(pause > 7 for pause in pauses[6:])


async def test_429_never_fails_a_row():
    played = Played(*[limited()] * 30, *[limited("2")] * 30, SUCCESS)
    assert (await wait(played, timeout=10_000)).result_urls


async def test_a_new_task_may_be_unknown_for_a_minute():
    played = Played(*[refusal(404)] * 4, SUCCESS)
    assert (await wait(played)).result_urls


@pytest.mark.parametrize(("age", "most"), [(0, 91), (50, 41), (70, 1)])
async def test_a_task_that_is_unknown_for_longer_is_not_there(age, most):
    played = Played(refusal(404))
    with pytest.raises(NotFoundError) as caught:
        await wait(played, age=age)
    assert played.waited < most
    assert caught.value.task_id == "task_1"


@pytest.mark.parametrize("code", [400, 401, 402, 403, 410])
async def test_a_refusal_is_raised_at_once(code):
    played = Played(refusal(code))
    with pytest.raises(RefusedError) as caught:
        await wait(played)
    assert len(played.requests) == 1
    assert (caught.value.code, caught.value.task_id) == (code, "task_1")


@pytest.mark.parametrize(
    ("told", "code", "message", "reason"),
    [
        (
            {"failCode": "CONTENT_VIOLATION", "failMsg": "unsafe"},
            "CONTENT_VIOLATION",
            "Task task_1 failed: CONTENT_VIOLATION: unsafe",
            "CONTENT_VIOLATION",
        ),
        ({}, None, "Task task_1 failed: no fail code: no message", "GenerationFailedError"),
        (
            {"failCode": "", "failMsg": ""},
            None,
            "Task task_1 failed: no fail code: no message",
            "GenerationFailedError",
        ),
    ],
)
async def test_a_failed_task_says_why(told, code, message, reason):
    played = Played(PROCESSING, ok({"taskId": "task_1", "state": "failed", **told}))
    with pytest.raises(GenerationFailedError) as caught:
        await wait(played)
    error = caught.value
    assert (error.code, error.message, error.reason) == (code, message, reason)
    assert error.task_id == "task_1"
    assert {error.retryable, error.fatal, error.not_accepted} == {False}


async def test_an_unknown_state_goes_on():
    played = Played(*(ok({"state": state}) for state in ("queued", "SUCCESS", "done?")), SUCCESS)
    await wait(played)
    assert len(played.requests) == 4


async def test_states_that_go_backwards_do_no_harm():
    played = Played(PROCESSING, ok({"state": "pending"}), PROCESSING, SUCCESS)
    assert (await wait(played)).result_urls


@pytest.mark.parametrize("stuck", [PROCESSING, None, refusal(500), limited()])
@pytest.mark.parametrize("after", [0, 10, 50])
async def test_cancellation_frees_the_slot(stuck, after):
    played = Played(stuck)
    task = asyncio.create_task(wait(played))
    await asyncio.sleep(after)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_thousand_waits_hold_no_thread_and_one_client():
    played = Played(SUCCESS)
    async with make_client(transport=played) as client:
        results = await asyncio.gather(
            *(
                wait_until_ended(client, GenerationTask(task_id="task_1"), PollingCadence())
                for _ in range(1_000)
            )
        )
    assert len(results) == len(played.requests) == 1_000


async def test_a_deadline_tells_what_the_last_answer_was():
    played = Played(ok({"taskId": "task_1", "state": "success", "resultJson": "no JSON"}))
    with pytest.raises(GenerationTimeoutError, match=r"last error: .*no result URL"):
        await wait(played, timeout=60)
