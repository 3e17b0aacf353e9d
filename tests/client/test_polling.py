"""The wait for a task, in virtual time."""

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
from tests.support.clients import (
    PROCESSING,
    REQUEST,
    SUCCESS,
    ScriptedTransport,
    make_client,
    ok,
    rate_limited,
)

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


def refusal(code):
    return (code, {"code": code, "message": "no"})


async def wait(transport, *, age=0.0, tasks=1_000, **cadence):
    """Wait for a task of some age; keep the times of the polls, from now, in `transport.polls`."""
    began = asyncio.get_running_loop().time()
    task = GenerationTask(
        task_id="task_1", request=REQUEST, submitted_at=utc_now() - timedelta(seconds=age)
    )
    async with make_client(transport=transport, tasks=tasks) as client:
        try:
            return await wait_until_ended(client, task, PollingCadence(**cadence))
        finally:
            assert client.limiter.tasks.running == 0
            transport.polls = [time - began for time in transport.times]
            transport.waited = asyncio.get_running_loop().time() - began


def about(seconds):
    # The age of a task comes from the calendar, which is not virtual.
    return pytest.approx(seconds, abs=0.5)


async def test_first_poll_comes_after_20_s_then_one_every_3_s():
    transport = ScriptedTransport(PROCESSING, PROCESSING, ok({"state": "pending"}), SUCCESS)
    result = await wait(transport)
    assert transport.polls == about([20, 23, 26, 29])
    assert result.result_urls == ["http://service.test/1.jpg"]
    assert result.request == REQUEST
    assert result.task_id == "task_1"


async def test_given_cadence_is_used():
    transport = ScriptedTransport(PROCESSING, PROCESSING, SUCCESS)
    await wait(transport, initial_delay=2, interval=0.5)
    assert transport.polls == about([2, 2.5, 3])


@pytest.mark.parametrize(("age", "first"), [(12, 8), (20, 0), (86_400, 0), (-3_600, 20)])
async def test_initial_delay_counts_from_the_submit(age, first):
    transport = ScriptedTransport(PROCESSING, SUCCESS)
    await wait(transport, age=age)
    assert transport.polls == about([first, first + 3])


async def test_submit_time_without_time_zone_is_utc():
    naive = utc_now().replace(tzinfo=None)
    assert isinstance(naive, datetime)
    async with make_client(transport=ScriptedTransport(SUCCESS)) as client:
        task = GenerationTask(task_id="task_1", submitted_at=naive)
        assert await wait_until_ended(client, task, PollingCadence())


async def test_timeout_error_names_the_task():
    transport = ScriptedTransport(PROCESSING)
    with pytest.raises(GenerationTimeoutError, match="task_1") as caught:
        await wait(transport, timeout=100)
    assert transport.waited == about(100)
    assert transport.polls[-1] < 100
    assert caught.value.task_id == "task_1"
    assert caught.value.__context__ is None


@pytest.mark.parametrize(
    "stuck", [None, rate_limited(), rate_limited("60"), httpx.ReadError(""), refusal(503)]
)
async def test_deadline_is_kept_whatever_the_service_does(stuck):
    transport = ScriptedTransport(stuck)
    with pytest.raises(GenerationTimeoutError):
        await wait(transport, timeout=100)
    assert transport.waited == about(100)
    assert transport.requests


@pytest.mark.parametrize(
    "fault",
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
        rate_limited(),
        rate_limited("5"),
        refusal(400),
        refusal(403),
        refusal(409),
        refusal(422),
        (200, {"code": 422, "message": "task not found"}),
        httpx.Response(400, text=""),
        httpx.Response(401, text="<html>Sign in"),
        httpx.Response(402, text="<html>"),
        httpx.Response(403, text="<html>Checking your browser"),
        httpx.Response(404, text="<html>"),
    ],
)
async def test_transient_error_is_retried(fault):
    transport = ScriptedTransport(PROCESSING, *[fault] * 7, SUCCESS)
    result = await wait(transport)
    assert result.result_urls
    assert len(transport.requests) == 9


async def test_failing_service_is_polled_ever_more_rarely():
    transport = ScriptedTransport(refusal(500))
    with pytest.raises(GenerationTimeoutError):
        await wait(transport, timeout=1_000)
    pauses = [b - a for a, b in zip(transport.polls, transport.polls[1:], strict=False)]
    assert all(3 <= pause <= 30 for pause in pauses)
    assert all(pause > 7 for pause in pauses[6:])


async def test_429_never_fails_a_wait():
    transport = ScriptedTransport(*[rate_limited()] * 30, *[rate_limited("2")] * 30, SUCCESS)
    assert (await wait(transport, timeout=10_000)).result_urls


async def test_404_of_a_new_task_is_retried():
    transport = ScriptedTransport(*[refusal(404)] * 4, SUCCESS)
    assert (await wait(transport)).result_urls


@pytest.mark.parametrize(("age", "most"), [(0, 91), (50, 41), (70, 15)])
async def test_lasting_404_is_raised_after_a_minute(age, most):
    transport = ScriptedTransport(refusal(404))
    with pytest.raises(NotFoundError) as caught:
        await wait(transport, age=age)
    assert transport.waited < most
    assert len(transport.requests) >= 3
    assert caught.value.task_id == "task_1"


async def test_single_404_of_an_old_task_is_retried():
    transport = ScriptedTransport(refusal(404), refusal(404), PROCESSING, refusal(404), SUCCESS)
    assert (await wait(transport, age=70)).result_urls


@pytest.mark.parametrize("code", [401, 402])
async def test_refusal_of_the_account_is_raised_immediately(code):
    transport = ScriptedTransport(refusal(code))
    with pytest.raises(RefusedError) as caught:
        await wait(transport)
    assert len(transport.requests) == 1
    assert (caught.value.code, caught.value.task_id) == (code, "task_1")


@pytest.mark.parametrize(
    ("fields", "code", "message", "reason"),
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
async def test_failed_task_error_has_code_and_message(fields, code, message, reason):
    transport = ScriptedTransport(
        PROCESSING, ok({"taskId": "task_1", "state": "failed", **fields})
    )
    with pytest.raises(GenerationFailedError) as caught:
        await wait(transport)
    error = caught.value
    assert (error.code, error.message, error.reason) == (code, message, reason)
    assert error.task_id == "task_1"
    assert {error.retryable, error.fatal, error.not_accepted} == {False}


async def test_unknown_state_counts_as_running():
    transport = ScriptedTransport(
        *(ok({"state": state}) for state in ("queued", "SUCCESS", "done?", "error")), SUCCESS
    )
    await wait(transport)
    assert len(transport.requests) == 5


@pytest.mark.parametrize("script", [[PROCESSING], [PROCESSING, httpx.ReadError("")]])
async def test_timeout_error_names_the_last_state(script):
    with pytest.raises(GenerationTimeoutError, match="last state: processing") as caught:
        await wait(ScriptedTransport(*script), timeout=60)
    assert ("last error: " in str(caught.value)) == (len(script) > 1)


async def test_state_may_go_back_to_pending():
    transport = ScriptedTransport(PROCESSING, ok({"state": "pending"}), PROCESSING, SUCCESS)
    assert (await wait(transport)).result_urls


@pytest.mark.parametrize("stuck", [PROCESSING, None, refusal(500), rate_limited()])
@pytest.mark.parametrize("after", [0, 10, 50])
async def test_cancellation_frees_the_slot(stuck, after):
    transport = ScriptedTransport(stuck)
    task = asyncio.create_task(wait(transport))
    await asyncio.sleep(after)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_one_client_serves_a_thousand_waits():
    transport = ScriptedTransport(SUCCESS)
    async with make_client(transport=transport) as client:
        results = await asyncio.gather(
            *(
                wait_until_ended(client, GenerationTask(task_id="task_1"), PollingCadence())
                for _ in range(1_000)
            )
        )
    assert len(results) == len(transport.requests) == 1_000


async def test_timeout_error_contains_the_last_error():
    transport = ScriptedTransport(
        ok({"taskId": "task_1", "state": "success", "resultJson": "no JSON"})
    )
    with pytest.raises(GenerationTimeoutError, match=r"last error: .*no result URL"):
        await wait(transport, timeout=60)
