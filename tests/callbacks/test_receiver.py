import asyncio
import json
import logging

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from prefect_flux_kontext.callbacks import receiver as receiver_module
from prefect_flux_kontext.callbacks.inbox import Inbox
from prefect_flux_kontext.callbacks.receiver import create_receiver
from prefect_flux_kontext.callbacks.tokens import Attempt, create_token
from prefect_flux_kontext.errors import ConfigurationError, LedgerError
from prefect_flux_kontext.ledger.store import RecordStore

pytestmark = pytest.mark.anyio

SECRET = "a-secret-of-the-tests-0123456789"
ATTEMPT = Attempt("0123456789abcdef", "0123456789abcdef" * 2, 1)
TOKEN = create_token(SECRET.encode(), ATTEMPT)
ENVELOPE = {"code": 200, "message": "success", "data": {"taskId": "task_1", "state": "success"}}


@pytest.fixture
def inbox(tmp_path):
    return Inbox(RecordStore(str(tmp_path)))


@pytest.fixture
def app(inbox):
    return create_receiver(inbox, SECRET)


def client(app):
    transport = httpx.ASGITransport(app=app)
    return httpx.AsyncClient(transport=transport, base_url="http://hooks.test", verify=False)


async def told(inbox):
    names = await inbox.names(ATTEMPT.owner)
    return [line.task_id for name in names for line in await inbox.read(ATTEMPT.owner, name)]


async def posted(app, path, body=ENVELOPE, method="POST"):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with client(app) as http:
        return await http.request(method, path, content=content)


def ours(caplog):
    """What the package has logged; httpx, which plays the service, tells every URL."""
    of_us = [record for record in caplog.records if record.name.startswith("prefect_flux")]
    return "\n".join(record.getMessage() for record in of_us)


@pytest.mark.parametrize("prefix", ["", "/hooks", "/a/b/c"])
async def test_a_callback_is_kept_whatever_path_leads_to_its_token(app, inbox, prefix):
    reply = await posted(app, f"{prefix}/{TOKEN}")
    assert (reply.status_code, reply.content) == (200, b"")
    assert await told(inbox) == ["task_1"]


async def test_it_can_be_mounted_in_an_application_of_ones_own(app, inbox):
    own = Starlette(routes=[Mount("/flux", app=app)])
    assert (await posted(own, f"/flux/{TOKEN}")).status_code == 200
    assert await told(inbox) == ["task_1"]


@pytest.mark.parametrize(
    "path",
    [
        f"/{TOKEN[:-1]}",
        f"/{TOKEN}x",
        f"/{TOKEN}/",
        f"/{TOKEN.swapcase()}",
        f"/{create_token(b'another secret of the tests', ATTEMPT)}",
        f"/{TOKEN.replace('.1.', '.2.')}",
        "/",
        "/%00",
        "/../../etc/passwd",
        "/x" * 1_000,
    ],
)
async def test_a_wrong_token_changes_nothing_and_is_answered_as_a_right_one(app, inbox, path):
    right = await posted(app, f"/{TOKEN}")
    reply = await posted(app, path, {**ENVELOPE, "data": {"taskId": "forged"}})
    assert (reply.status_code, reply.content, reply.headers) == (200, b"", right.headers)
    assert await told(inbox) == ["task_1"]


async def test_wrong_tokens_are_told_now_and_then_and_never_repeated(app, caplog):
    with caplog.at_level(logging.DEBUG):
        for number in range(20):
            await posted(app, f"/{TOKEN[:-1]}{number}")
    assert caplog.text.count("invalid callback token") == 1
    assert TOKEN[:-1] not in ours(caplog)


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH"])
async def test_nothing_but_a_post_is_taken(app, inbox, method):
    assert (await posted(app, f"/{TOKEN}", method=method)).status_code == 405
    assert await told(inbox) == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"\xff\xfe",
        b'{"code": 200, "data": null}',
        b'{"data": {"taskId": {"nested": 1}}}',
        b'{"data": {"taskId": "' + b"x" * 300 + b'"}}',
        b'{"data": {"taskId": "a\\u0000b"}}',
        b"[" * 60_000,
    ],
)
async def test_a_right_token_counts_whatever_the_body_says(app, inbox, body):
    assert (await posted(app, f"/{TOKEN}", body)).status_code == 200
    assert await told(inbox) == [None]


async def test_an_error_envelope_tells_its_task_too(app, inbox):
    data = {"taskId": 12345, "state": "failed", "failCode": "CONTENT_VIOLATION"}
    await posted(app, f"/{TOKEN}", {"code": 501, "message": "failed", "data": data})
    assert await told(inbox) == ["12345"]


@pytest.mark.parametrize("token", [TOKEN, "wrong"])
async def test_a_body_of_more_than_64_kb_is_refused_unread(app, inbox, token):
    read = 0

    async def endless():
        nonlocal read
        for _ in range(10_000):
            read += 16_384
            yield b"x" * 16_384

    async with client(app) as http:
        reply = await http.post(f"/{token}", content=endless())
    assert (reply.status_code, reply.content) == (413, b"")
    assert await told(inbox) == []


@pytest.mark.virtual_time
@pytest.mark.parametrize("token", [TOKEN, "wrong"])
async def test_a_body_that_drips_is_cut_off_after_ten_seconds(app, inbox, token):
    async def drip():
        while True:
            yield b" "
            await asyncio.sleep(1)

    began = asyncio.get_running_loop().time()
    async with client(app) as http:
        reply = await http.post(f"/{token}", content=drip())
    assert reply.status_code == 408
    assert asyncio.get_running_loop().time() - began == pytest.approx(10, abs=1)
    assert await told(inbox) == []


async def test_a_replayed_callback_is_answered_and_kept_once(app, inbox):
    for _ in range(20):
        assert (await posted(app, f"/{TOKEN}")).status_code == 200
    assert await told(inbox) == ["task_1"]


async def test_of_one_url_no_more_than_four_different_bodies_are_kept(app, inbox):
    for number in range(20):
        body = {"data": {"taskId": f"task_{number}"}}
        assert (await posted(app, f"/{TOKEN}", body)).status_code == 200
    assert len(await told(inbox)) == 4


async def test_what_is_remembered_of_answered_callbacks_is_bounded(app, inbox, monkeypatch):
    monkeypatch.setattr(receiver_module, "_REMEMBERED_ATTEMPTS", 10)
    for number in range(1, 40):
        await posted(app, f"/{create_token(SECRET.encode(), ATTEMPT._replace(number=number))}")
    assert len(await told(inbox)) == 39


@pytest.mark.virtual_time
async def test_what_cannot_be_made_durable_is_not_acknowledged(app, inbox, monkeypatch, caplog):
    async def full(_name, _data):
        raise LedgerError("the disk is full")

    monkeypatch.setattr(inbox._store, "create", full)
    assert (await posted(app, f"/{TOKEN}")).status_code == 503
    monkeypatch.undo()
    assert (await posted(app, f"/{TOKEN}")).status_code == 200
    assert await told(inbox) == ["task_1"]
    assert "the disk is full" in caplog.text
    assert TOKEN not in ours(caplog)


@pytest.mark.virtual_time
async def test_a_filesystem_that_hangs_is_answered_before_the_service_gives_up(
    app, inbox, monkeypatch
):
    monkeypatch.setattr(inbox._store, "create", lambda *_: asyncio.Event().wait())
    began = asyncio.get_running_loop().time()
    assert (await posted(app, f"/{TOKEN}")).status_code == 503
    assert asyncio.get_running_loop().time() - began < 30


def test_a_receiver_without_a_secret_is_refused(inbox):
    with pytest.raises(ConfigurationError, match="FLUX_KONTEXT_CALLBACK_SECRET"):
        create_receiver(inbox, None)
