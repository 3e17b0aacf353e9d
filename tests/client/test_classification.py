"""The specification of errors: which reply raises which error, for submits and for polls.

Each row says which class of error the reply raises. `ACCEPTED?` marks replies after which the
request may be accepted and billed, so it must not be repeated. The others are known not to be.
"""

import gzip
import json

import pytest

from prefect_flux_kontext.errors import (
    ApiError,
    ForbiddenError,
    InsufficientBalanceError,
    InvalidRequestError,
    NotFoundError,
    RefusedError,
    ServiceTroubleError,
    UnauthorizedError,
    UnreadableReplyError,
)
from tests.support.clients import REQUEST, make_client
from tests.support.scripted_server import ScriptedServer, endless, envelope, html, redirect, reply

pytestmark = pytest.mark.anyio

KNOWN, MAYBE = "not accepted", "ACCEPTED?"
FATAL, ROW_ONLY = "stops the batch", "fails alone"
RETRY, NO_RETRY = "retryable", "not retryable"

CODES = {
    400: (InvalidRequestError, KNOWN, NO_RETRY, ROW_ONLY),
    401: (UnauthorizedError, KNOWN, NO_RETRY, FATAL),
    402: (InsufficientBalanceError, KNOWN, NO_RETRY, FATAL),
    403: (ForbiddenError, KNOWN, NO_RETRY, ROW_ONLY),
    404: (NotFoundError, KNOWN, NO_RETRY, ROW_ONLY),
    405: (RefusedError, KNOWN, NO_RETRY, ROW_ONLY),
    418: (RefusedError, KNOWN, NO_RETRY, ROW_ONLY),
    422: (RefusedError, KNOWN, NO_RETRY, ROW_ONLY),
    500: (ServiceTroubleError, MAYBE, RETRY, ROW_ONLY),
    502: (ServiceTroubleError, MAYBE, RETRY, ROW_ONLY),
    503: (ServiceTroubleError, MAYBE, RETRY, ROW_ONLY),
    504: (ServiceTroubleError, MAYBE, RETRY, ROW_ONLY),
    524: (ServiceTroubleError, MAYBE, RETRY, ROW_ONLY),
}
"""Without 429, which the client waits out (`test_limited_submits`)."""

PAGES = ("HTTP status, null", "HTTP status, empty", "HTTP status, HTML")
"""Shapes that are not the service's: a page with 4xx says nothing about a task."""

SHAPES = {
    "HTTP status": lambda code: envelope(code, {"error": "why"}, "no", status=code),
    "HTTP 200": lambda code: envelope(code, {"error": "why"}, "no"),
    "HTTP 202": lambda code: envelope(code, {"error": "why"}, "no", status=202),
    "code as text": lambda code: envelope(str(code), {"error": "why"}, "no"),
    "code as float": lambda code: envelope(float(code), {"error": "why"}, "no"),
    "data null": lambda code: envelope(code, None, "no"),
    "data absent": lambda code: reply(200, {"code": code, "message": "no"}),
    "data a list": lambda code: envelope(code, [1, 2], "no"),
    "msg": lambda code: reply(200, {"code": code, "msg": "no"}),
    "message an object": lambda code: envelope(code, None, {"en": "no"}),
    "HTTP status, null": lambda code: reply(code, b"null"),
    "HTTP status, empty": lambda code: reply(code, b""),
    "HTTP status, HTML": lambda code: html(code, "no such luck"),
    "HTTP status, other code within": lambda code: envelope(200, None, "no", status=code),
    "byte order mark": lambda code: reply(
        200, b"\xef\xbb\xbf" + json.dumps({"code": code, "message": "no"}).encode()
    ),
}


async def raise_error(play, call):
    async with ScriptedServer(play) as server, make_client(server.url) as client:
        with pytest.raises(ApiError) as caught:
            await (client.submit(REQUEST) if call == "submit" else client.status("task_1"))
        assert len(server.seen) == 1
    return caught.value


def classify(error):
    return (
        type(error),
        KNOWN if error.not_accepted else MAYBE,
        RETRY if error.retryable else NO_RETRY,
        FATAL if error.fatal else ROW_ONLY,
    )


@pytest.mark.parametrize("call", ["submit", "status"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("code", CODES)
async def test_error_code_means_the_same_in_every_shape(code, shape, call):
    error = await raise_error(SHAPES[shape](code), call)
    is_page = call == "status" and shape in PAGES and code < 500
    unreadable = (UnreadableReplyError, MAYBE, RETRY, ROW_ONLY)
    assert classify(error) == (unreadable if is_page else CODES[code])
    assert error.code == code
    assert error.task_id == ("task_1" if call == "status" else None)
    assert str(error) == error.message
    assert "no" in error.message or shape in ("HTTP status, null", "HTTP status, empty")
    assert str(code) in error.message


UNREADABLE = {
    "HTML with 200": html(200),
    "empty": reply(200, b""),
    "blank": reply(200, b"  \r\n"),
    "cut JSON": reply(200, b'{"code": 200, "data": {"taskId": "task'),
    "an array": reply(200, []),
    "a number": reply(200, 200),
    "null": reply(200, None),
    "a string": reply(200, "success"),
    "an empty object": reply(200, {}),
    "deep nesting": reply(200, b"[" * 100_000 + b"]" * 100_000),
    "deep nesting of objects": reply(200, b'{"code":' * 100_000),
    "a huge int": reply(200, b'{"code": ' + b"9" * 5_000 + b"}"),
    "an int of 300 digits": reply(200, {"code": 10**300}),
    "an infinite code": reply(200, b'{"code": Infinity}'),
    "not a code": reply(200, {"code": 0}),
    "a negative code": reply(200, {"code": -400}),
    "a code of no kind": reply(200, {"code": 700}),
    "no UTF-8": reply(200, b'{"code": 200, "data": {"taskId": "\xff\xfe"}}'),
    "no content": reply(204, b""),
    "not gzip": reply(200, b"plainly not", content_encoding="gzip"),
    "gzip cut short": reply(200, gzip.compress(b'{"code": 200}')[:-12], content_encoding="gzip"),
    "a gzip bomb": reply(
        200, gzip.compress(b'{"code": 200, "x": "' + b"x" * 2**24 + b'"}'), content_encoding="gzip"
    ),
    "more than 4 MB": endless,
    "a redirect": redirect("/elsewhere", 307),
    "a redirect that turns POST to GET": redirect("/elsewhere", 303),
    "a redirect nowhere": redirect("http://[", 302),
    "not modified": reply(304),
    "an HTTP status of no kind": reply(700, {"code": 200, "data": {"taskId": ""}}),
    "data null": envelope(200, None),
    "data absent": reply(200, {"code": 200}),
    "data a list": envelope(200, ["task_1"]),
    "data a string": envelope(200, "task_1"),
}


@pytest.mark.parametrize("call", ["submit", "status"])
@pytest.mark.parametrize("what", UNREADABLE)
async def test_unreadable_reply_may_have_been_accepted(what, call):
    error = await raise_error(UNREADABLE[what], call)
    assert type(error) is UnreadableReplyError
    assert classify(error)[1:] == (MAYBE, RETRY, ROW_ONLY)
    assert error.task_id == ("task_1" if call == "status" else None)
    assert len(error.message) < 1_000


@pytest.mark.parametrize(
    "task_id",
    [None, "", "  ", True, 1.5, [], {}, ["task_1"], "x" * 201, "a\nb", "a\x00b", "\ud800"],
)
async def test_success_without_task_id_may_have_been_accepted(task_id):
    error = await raise_error(envelope(data={"taskId": task_id}), "submit")
    assert type(error) is UnreadableReplyError
    assert not error.not_accepted


@pytest.mark.parametrize("code", [0, 300, 400, 402, 429, 500, 503])
@pytest.mark.parametrize("by_status", [True, False])
async def test_error_reply_with_task_id_may_have_been_accepted(code, by_status):
    status = code if by_status and code >= 300 else 200
    error = await raise_error(envelope(code, {"taskId": "task_9"}, status=status), "submit")
    assert type(error) is UnreadableReplyError
    assert not error.not_accepted
    assert error.task_id == "task_9"


@pytest.mark.parametrize(
    "play",
    [
        envelope(data={"taskId": "task_1"}),
        envelope("200", {"taskId": "task_1"}),
        envelope(200.0, {"taskId": "task_1", "more": [1]}),
        envelope(None, {"taskId": "task_1"}),
        envelope("success", {"taskId": "task_1"}),
        envelope(201, {"taskId": "task_1"}, status=201),
        envelope(200, {"taskId": "task_1"}, status=202),
        reply(200, {"data": {"taskId": "task_1"}}),
        reply(200, b'\xef\xbb\xbf{"code": 200, "data": {"taskId": "task_1"}}'),
        reply(200, '{"code": 200, "data": {"taskId": "task_1"}}'.encode("utf-16")),
        reply(200, {"code": 200, "data": {"taskId": "task_1"}}, content_type="text/html"),
        reply(
            200,
            gzip.compress(b'{"code": 200, "data": {"taskId": "task_1"}}'),
            content_encoding="gzip",
        ),
    ],
)
async def test_task_id_is_found_in_every_shape_of_success(play):
    async with ScriptedServer(play) as server, make_client(server.url) as client:
        task = await client.submit(REQUEST)
    assert task.task_id == "task_1"
    assert task.request == REQUEST
    assert server.seen[0].json() == REQUEST.body()


async def test_task_id_may_be_a_number():
    play = envelope(data={"taskId": 12345678})
    async with ScriptedServer(play) as server, make_client(server.url) as client:
        assert (await client.submit(REQUEST)).task_id == "12345678"


@pytest.mark.parametrize("task_id", ["../../admin", "a b&c=d#e?f/g", "é%2F", "task_1"])
async def test_task_id_is_escaped_in_the_url(task_id):
    play = envelope(data={"taskId": task_id, "state": "pending"})
    async with ScriptedServer(play) as server, make_client(server.url) as client:
        status = await client.status(task_id)
    assert status.task_id == task_id
    assert server.seen[0].target.startswith("/api/v1/statusTask/flux-kontext?taskId=")
    assert not {" ", "#", "&"} & set(server.seen[0].target)
