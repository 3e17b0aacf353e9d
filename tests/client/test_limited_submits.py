"""A submit rejected with 429 is repeated after the time that the service asks for."""

import pytest

from tests.support.clients import ACCEPTED, REQUEST, ScriptedTransport, make_client, rate_limited
from tests.support.scripted_server import (
    ScriptedServer,
    accepted,
    envelope,
    half_a_reply,
    html,
    reply,
)

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    "play",
    [
        envelope(429, status=429, retry_after="0.01"),
        envelope(429, retry_after="0.01"),
        reply(429, b"", retry_after="0.01"),
        html(429, "slow down"),
        half_a_reply(429),
    ],
)
async def test_429_is_posted_again_until_accepted(play, monkeypatch):
    monkeypatch.setattr(
        "prefect_flux_kontext.client.limits.account.jittered_backoff", lambda _: 0.01
    )
    async with (
        ScriptedServer(play, play, accepted()) as server,
        make_client(server.url) as client,
    ):
        assert (await client.submit(REQUEST)).task_id == "task_1"
        assert len(server.seen) == 3
        assert client.limiter.tasks.running == 1


@pytest.mark.virtual_time
@pytest.mark.parametrize("requests", [1, 100, 10_000])
async def test_429_is_waited_out_for_hours(requests):
    transport = ScriptedTransport(*[rate_limited()] * 300, ACCEPTED)
    async with make_client(transport=transport, requests=requests) as client:
        assert (await client.submit(REQUEST)).task_id == "task_1"
    assert len(transport.requests) == 301
    for earlier, later in zip(transport.times, transport.times[60:], strict=False):
        assert later - earlier >= 60 * 60 / 4 / 60


@pytest.mark.virtual_time
@pytest.mark.parametrize(
    ("header", "least", "most"),
    [
        ("7", 7, 7.1),
        (" 7 ", 7, 7.1),
        ("2.5", 2.5, 2.6),
        ("1000000000", 300, 300.1),
        ("inf", 300, 300.1),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 300, 300.1),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.25, 1),
        ("0", 0.25, 1),
        ("-5", 0.25, 1),
        ("nan", 0.25, 1),
        ("soon", 0.25, 1),
        ("", 0.25, 1),
        ("Mon, 01 Jan 99999999999999999999 00:00:00 GMT", 0.25, 1),
        ("5, 7", 0.25, 1),
        (None, 0.25, 1),
    ],
)
async def test_valid_retry_after_is_honoured(header, least, most):
    transport = ScriptedTransport(rate_limited(header), ACCEPTED)
    async with make_client(transport=transport) as client:
        await client.submit(REQUEST)
    assert least <= transport.times[1] - transport.times[0] <= most


@pytest.mark.virtual_time
async def test_repeated_retry_after_zero_is_backed_off():
    transport = ScriptedTransport(*[rate_limited("0")] * 50, ACCEPTED)
    async with make_client(transport=transport) as client:
        await client.submit(REQUEST)
    assert transport.times[-1] - transport.times[0] > 120
