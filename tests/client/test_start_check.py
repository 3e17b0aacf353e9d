"""The check at the start of a batch: a service that cannot be used is refused before payment."""

import socket

import pytest

from prefect_flux_kontext.client import client as client_module
from prefect_flux_kontext.errors import (
    NotConnectedError,
    ReplyLostError,
    ServiceTroubleError,
    UnauthorizedError,
    UnreadableReplyError,
)
from tests.support.clients import make_client
from tests.support.scripted_server import (
    ScriptedServer,
    envelope,
    hang_up,
    html,
    redirect,
    reply,
)

pytestmark = pytest.mark.anyio

BALANCE = envelope(data={"balance": 12.5})


@pytest.fixture(autouse=True)
def _short_patience(monkeypatch):
    monkeypatch.setattr(client_module, "_START_PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(client_module, "jittered_backoff", lambda _attempt: 0.01)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (redirect("https://elsewhere.test/"), UnreadableReplyError),
        (html(200), UnreadableReplyError),
        (html(502), ServiceTroubleError),
        (envelope(503, message="down"), ServiceTroubleError),
        (reply(200, b""), UnreadableReplyError),
        (hang_up, ReplyLostError),
    ],
    ids=["redirect", "HTML", "502", "503 in the envelope", "an empty body", "no reply"],
)
async def test_service_without_usable_replies_is_refused(answer, error):
    async with ScriptedServer(answer) as server, make_client(server.url) as client:
        with pytest.raises(error, match="nothing was submitted") as caught:
            await client.check()
    assert server.url in str(caught.value)
    assert len(server.seen) > 1
    assert {seen.method for seen in server.seen} == {"GET"}


async def test_service_that_recovers_is_used():
    script = [html(502), envelope(503), redirect("/maintenance"), BALANCE]
    async with ScriptedServer(*script) as server, make_client(server.url) as client:
        assert await client.check() == 12.5


@pytest.mark.parametrize(
    "answer",
    [envelope(404), html(404), envelope(403), envelope(429), envelope(data="none"), html(405)],
    ids=["404", "404 as HTML", "403", "429", "no number", "405"],
)
async def test_service_without_a_balance_is_used(answer):
    async with ScriptedServer(answer) as server, make_client(server.url) as client:
        assert await client.check() is None


async def test_refused_key_is_reported_at_once():
    async with ScriptedServer(envelope(401)) as server, make_client(server.url) as client:
        with pytest.raises(UnauthorizedError):
            await client.check()
    assert len(server.seen) == 1


async def test_missing_service_is_reported_at_once():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        async with make_client(f"http://127.0.0.1:{bound.getsockname()[1]}") as client:
            with pytest.raises(NotConnectedError):
                await client.check()
