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


async def stored_task_ids(inbox):
    names = await inbox.list_names(ATTEMPT.owner)
    return [line.task_id for name in names for line in await inbox.read(ATTEMPT.owner, name)]


async def post(app, path, body=ENVELOPE, method="POST"):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with client(app) as http:
        return await http.request(method, path, content=content)


def package_log(caplog):
    """Return the package's log without that of httpx, which logs every URL."""
    records = [record for record in caplog.records if record.name.startswith("prefect_flux")]
    return "\n".join(record.getMessage() for record in records)


@pytest.mark.parametrize("prefix", ["", "/hooks", "/a/b/c"])
async def test_callback_is_stored_under_any_path_prefix(app, inbox, prefix):
    reply = await post(app, f"{prefix}/{TOKEN}")
    assert (reply.status_code, reply.content) == (200, b"")
    assert await stored_task_ids(inbox) == ["task_1"]


async def test_receiver_can_be_mounted_in_an_application(app, inbox):
    own = Starlette(routes=[Mount("/flux", app=app)])
    assert (await post(own, f"/flux/{TOKEN}")).status_code == 200
    assert await stored_task_ids(inbox) == ["task_1"]


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
async def test_wrong_token_is_ignored_with_the_same_answer(app, inbox, path):
    right = await post(app, f"/{TOKEN}")
    reply = await post(app, path, {**ENVELOPE, "data": {"taskId": "forged"}})
    assert (reply.status_code, reply.content, reply.headers) == (200, b"", right.headers)
    assert await stored_task_ids(inbox) == ["task_1"]


async def test_wrong_tokens_are_logged_rarely_and_not_quoted(app, caplog):
    with caplog.at_level(logging.DEBUG):
        for number in range(20):
            await post(app, f"/{TOKEN[:-1]}{number}")
    assert caplog.text.count("invalid callback token") == 1
    assert TOKEN[:-1] not in package_log(caplog)


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH"])
async def test_other_methods_than_post_get_405(app, inbox, method):
    assert (await post(app, f"/{TOKEN}", method=method)).status_code == 405
    assert await stored_task_ids(inbox) == []


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
async def test_right_token_counts_with_any_body(app, inbox, body):
    assert (await post(app, f"/{TOKEN}", body)).status_code == 200
    assert await stored_task_ids(inbox) == [None]


async def test_task_id_is_read_from_an_error_envelope(app, inbox):
    data = {"taskId": 12345, "state": "failed", "failCode": "CONTENT_VIOLATION"}
    await post(app, f"/{TOKEN}", {"code": 501, "message": "failed", "data": data})
    assert await stored_task_ids(inbox) == ["12345"]


@pytest.mark.parametrize("token", [TOKEN, "wrong"])
async def test_body_over_64_kb_is_refused_unread(app, inbox, token):
    read = 0

    async def endless():
        nonlocal read
        for _ in range(10_000):
            read += 16_384
            yield b"x" * 16_384

    async with client(app) as http:
        reply = await http.post(f"/{token}", content=endless())
    assert (reply.status_code, reply.content) == (413, b"")
    assert await stored_task_ids(inbox) == []


@pytest.mark.virtual_time
@pytest.mark.parametrize("token", [TOKEN, "wrong"])
async def test_slow_body_is_cut_off_after_10_s(app, inbox, token):
    async def drip():
        while True:
            yield b" "
            await asyncio.sleep(1)

    began = asyncio.get_running_loop().time()
    async with client(app) as http:
        reply = await http.post(f"/{token}", content=drip())
    assert reply.status_code == 408
    assert asyncio.get_running_loop().time() - began == pytest.approx(10, abs=1)
    assert await stored_task_ids(inbox) == []


async def test_replayed_callback_is_stored_once(app, inbox):
    for _ in range(20):
        assert (await post(app, f"/{TOKEN}")).status_code == 200
    assert await stored_task_ids(inbox) == ["task_1"]


async def test_at_most_four_bodies_per_url_are_stored(app, inbox):
    for number in range(20):
        body = {"data": {"taskId": f"task_{number}"}}
        assert (await post(app, f"/{TOKEN}", body)).status_code == 200
    assert len(await stored_task_ids(inbox)) == 4


async def test_memory_of_answered_callbacks_is_bounded(app, inbox, monkeypatch):
    monkeypatch.setattr(receiver_module, "_REMEMBERED_ATTEMPTS", 10)
    for number in range(1, 40):
        await post(app, f"/{create_token(SECRET.encode(), ATTEMPT._replace(number=number))}")
    assert len(await stored_task_ids(inbox)) == 39


@pytest.mark.virtual_time
async def test_callback_that_cannot_be_stored_gets_503(app, inbox, monkeypatch, caplog):
    async def full(_name, _data):
        raise LedgerError("the disk is full")

    monkeypatch.setattr(inbox._store, "create", full)
    assert (await post(app, f"/{TOKEN}")).status_code == 503
    monkeypatch.undo()
    assert (await post(app, f"/{TOKEN}")).status_code == 200
    assert await stored_task_ids(inbox) == ["task_1"]
    assert "the disk is full" in caplog.text
    assert TOKEN not in package_log(caplog)


@pytest.mark.virtual_time
async def test_hanging_filesystem_gets_503_within_30_s(app, inbox, monkeypatch):
    monkeypatch.setattr(inbox._store, "create", lambda *_: asyncio.Event().wait())
    began = asyncio.get_running_loop().time()
    assert (await post(app, f"/{TOKEN}")).status_code == 503
    assert asyncio.get_running_loop().time() - began < 30


def test_receiver_without_secret_is_refused(inbox):
    with pytest.raises(ConfigurationError, match="FLUX_KONTEXT_CALLBACK_SECRET"):
        create_receiver(inbox, None)
