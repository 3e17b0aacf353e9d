"""A submit is repeated only if it is known not to have been accepted."""

import asyncio
import socket
import time
from contextlib import nullcontext

import httpx
import pytest

from prefect_flux_kontext.client import client as client_module
from prefect_flux_kontext.client import transport
from prefect_flux_kontext.errors import (
    BatchStoppedError,
    InvalidRequestError,
    NotConnectedError,
    RateLimitedError,
    RefusedError,
    ReplyLostError,
    ServiceTroubleError,
    UnreadableReplyError,
)
from prefect_flux_kontext.sandbox.faults.plan import FaultPlan
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from tests.support.clients import ACCEPTED, KEY, REQUEST, ScriptedTransport, make_client
from tests.support.scripted_server import (
    ScriptedServer,
    accepted,
    envelope,
    half_a_reply,
    hang_up,
    html,
    redirect,
    reply,
    reset,
    silence,
)

pytestmark = pytest.mark.anyio


async def post_until_final(client):
    """Post the request until the outcome is final. Returns all outcomes."""
    attempts, outcomes = client.submit_attempts(), []
    while not attempts.is_over:
        async with await attempts.next_slot() as slot:
            outcomes.append(await slot.post(REQUEST))
    return outcomes


def dropped_head(status):
    async def play(writer):
        writer.write(f"HTTP/1.1 {status} Scripted\r\nContent-Le".encode())
        await writer.drain()
        return False

    return play


MAYBE_ACCEPTED = {
    "silence": (silence, ReplyLostError),
    "reset after the request": (reset, ReplyLostError),
    "hung up without a reply": (hang_up, ReplyLostError),
    "half a head": (dropped_head(200), ReplyLostError),
    "half a body": (half_a_reply(), ReplyLostError),
    "half a 500": (half_a_reply(500), ReplyLostError),
    "not HTTP": (reply(status="what"), ReplyLostError),
    **{f"HTTP {code}": (html(code), ServiceTroubleError) for code in (500, 502, 503, 504)},
    **{f"envelope {code}": (envelope(code), ServiceTroubleError) for code in (500, 502, 503, 504)},
    "200 without a task": (envelope(data={}), UnreadableReplyError),
    "200 that is HTML": (html(200), UnreadableReplyError),
    "200 that is cut JSON": (reply(200, b'{"code": 200,'), UnreadableReplyError),
    "307": (redirect("/api/v1/generateTask/flux-kontext", 307), UnreadableReplyError),
    "308": (redirect("/api/v1/generateTask/flux-kontext", 308), UnreadableReplyError),
    "302": (redirect("/api/v1/generateTask/flux-kontext", 302), UnreadableReplyError),
    "429 that names a task": (envelope(429, {"taskId": "x"}, status=429), UnreadableReplyError),
}


@pytest.mark.parametrize("connection", ["new", "kept alive"])
@pytest.mark.parametrize("what", MAYBE_ACCEPTED)
async def test_request_that_may_be_accepted_is_posted_once(what, connection):
    play, kind = MAYBE_ACCEPTED[what]
    before = [envelope(data={"taskId": "t", "state": "pending"})] * (connection == "kept alive")
    async with (
        ScriptedServer(*before, play, accepted()) as server,
        make_client(server.url, read=0.2) as client,
    ):
        for _ in before:
            await client.status("t")
        with pytest.raises(kind) as caught:
            await client.submit(REQUEST)
        assert [seen.method for seen in server.seen].count("POST") == 1
        assert client.limiter.tasks.running == 0
    assert not caught.value.not_accepted
    assert not caught.value.fatal
    if connection == "kept alive" and len(server.seen) == 2:
        assert {seen.connection for seen in server.seen} == {1}


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
async def test_refusal_counts_even_with_half_a_body(status):
    async with ScriptedServer(half_a_reply(status)) as server, make_client(server.url) as client:
        with pytest.raises(RefusedError) as caught:
            await client.submit(REQUEST)
    assert caught.value.code == status
    assert len(server.seen) == 1


async def test_refused_connection_is_attempted_eight_times(monkeypatch):
    monkeypatch.setattr(client_module, "jittered_backoff", lambda _: 0.0)
    with socket.socket() as bound:  # it does not listen
        bound.bind(("127.0.0.1", 0))
        async with make_client(f"http://127.0.0.1:{bound.getsockname()[1]}") as client:
            outcomes = await post_until_final(client)
            assert client.limiter.tasks.running == 0
    assert len(outcomes) == 8
    assert all(isinstance(outcome.error, NotConnectedError) for outcome in outcomes)
    assert all(outcome.is_rejected and not outcome.is_unknown for outcome in outcomes)


async def test_service_that_starts_late_gets_the_request_once(monkeypatch):
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        server = ScriptedServer(accepted())

        def start_listening(_):
            bound.listen()
            return 0.0

        monkeypatch.setattr(client_module, "jittered_backoff", start_listening)
        async with server, make_client(url) as client:
            late = await asyncio.start_server(server._serve, sock=bound)
            await late.start_serving()
            assert (await client.submit(REQUEST)).task_id == "task_1"
            late.close()
    assert len(server.seen) == 1


@pytest.mark.virtual_time
@pytest.mark.parametrize(
    ("error", "posts"),
    [
        (httpx.ConnectError("no route"), 2),
        (httpx.ConnectTimeout(""), 2),
        (httpx.PoolTimeout(""), 2),
        (httpx.ProxyError("407"), 2),
        (httpx.ReadTimeout(""), 1),
        (httpx.ReadError(""), 1),
        (httpx.WriteTimeout(""), 1),
        (httpx.WriteError(""), 1),
        (httpx.CloseError(""), 1),
        (httpx.RemoteProtocolError("Server disconnected without sending a response."), 1),
        (httpx.LocalProtocolError(""), 1),
        (httpx.DecodingError(""), 1),
        (httpx.TooManyRedirects(""), 1),
        (TimeoutError(), 1),
    ],
)
async def test_only_a_request_never_sent_is_posted_again(error, posts):
    transport = ScriptedTransport(error, ACCEPTED)
    async with make_client(transport=transport) as client:
        with pytest.raises(ReplyLostError) if posts == 1 else nullcontext():
            await client.submit(REQUEST)
        assert len(transport.requests) == posts


@pytest.mark.virtual_time
async def test_trickling_reply_is_lost_after_two_minutes():
    class Trickle(httpx.AsyncByteStream):
        async def __aiter__(self):
            while True:
                await asyncio.sleep(30)
                yield b" "

    def handler(request):
        return httpx.Response(200, stream=Trickle())

    async with make_client(transport=httpx.MockTransport(handler)) as client:
        began = asyncio.get_running_loop().time()
        with pytest.raises(ReplyLostError):
            await client.submit(REQUEST)
        assert asyncio.get_running_loop().time() - began == pytest.approx(120)


async def test_each_post_has_its_own_slot(monkeypatch):
    monkeypatch.setattr(
        "prefect_flux_kontext.client.limits.account.jittered_backoff", lambda _: 0.0
    )
    async with (
        ScriptedServer(envelope(429, status=429), accepted()) as server,
        make_client(server.url) as client,
    ):
        rejected, last = await post_until_final(client)
        assert client.limiter.tasks.running == 1
    assert isinstance(rejected.error, RateLimitedError)
    assert rejected.may_retry
    assert last.is_accepted
    assert last.task_id == "task_1"


async def test_unknown_outcome_ends_the_attempts():
    async with (
        ScriptedServer(envelope(502, status=502)) as server,
        make_client(server.url) as client,
    ):
        (outcome,) = await post_until_final(client)
        assert client.limiter.tasks.running == 0
    assert outcome.is_unknown
    assert not outcome.is_rejected
    assert not outcome.may_retry


async def test_error_before_the_post_sends_nothing_and_frees_the_slot():
    async with ScriptedServer(accepted()) as server, make_client(server.url) as client:
        slot = await client.submit_attempts().next_slot()
        assert client.limiter.tasks.running == 1
        with pytest.raises(BatchStoppedError):
            async with slot:
                raise BatchStoppedError("enough")
        assert server.seen == []
        assert client.limiter.tasks.running == 0


async def test_cancelled_submit_frees_its_slot():
    async with ScriptedServer(silence) as server, make_client(server.url) as client:
        task = asyncio.create_task(client.submit(REQUEST))
        while not server.seen:  # noqa: ASYNC110 - the server has no event to wait for
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert client.limiter.tasks.running == 0


async def test_invalid_request_is_posted_once():
    async with (
        ScriptedServer(envelope(400, {"error": "prompt"}, "bad"), accepted()) as server,
        make_client(server.url) as client,
    ):
        with pytest.raises(InvalidRequestError, match="400: bad: prompt"):
            await client.submit(REQUEST)
    assert len(server.seen) == 1


async def test_reply_that_arrived_during_a_freeze_is_read(monkeypatch):
    """A suspended process resumes after all its time limits; the reply waits in the socket."""
    monkeypatch.setattr(transport, "_REQUEST_TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(transport, "_LATE_SECONDS", 0.5)
    settings = SandboxSettings(long_edge=16, api_key=KEY)
    plan = FaultPlan(faults=["submit:slow"], slow=0.05)
    with running_sandbox(settings, plan=plan) as sandbox:
        async with make_client(sandbox.url) as client:
            asyncio.get_running_loop().call_later(0.02, time.sleep, 1.5)
            tasks = await asyncio.gather(*(client.submit(REQUEST) for _ in range(8)))
        assert len({task.task_id for task in tasks}) == sandbox.service.bill()["accepted"] == 8
