"""Replies that are refused, late, torn or endless on a real connection, and the bill after it."""

import httpx
import pytest

from prefect_flux_kontext.sandbox.faults.handlers import FAULTS
from tests.sandbox.faults.asking import BODY, accepted, ask, ended, kinds_of, plan, status, submit
from tests.sandbox.faults.test_responses import DATA
from tests.sandbox.helpers import STATUS, SUBMIT

ANSWERS = {
    "limited": (429, 429),
    "limited-silently": (429, 429),
    "limited-oddly": (429, 429),
    "limited-in-200": (200, 429),
    "too-many-tasks": (429, 429),
    "too-many-tasks-in-200": (200, 429),
    "refused": (400, 400),
    "refused-content": (400, 400),
    "not-found-in-200": (200, 422),
    "unauthorized": (401, 401),
    "no-balance": (402, 402),
    "unavailable-in-200": (200, 500),
    "trouble-after-in-200": (200, 500),
    "not-found": (404, 404),
    "expired": (403, 403),
}

AFTER = {"trouble-after", "trouble-after-in-200"}


@pytest.mark.parametrize(("kind", "name"), kinds_of(*ANSWERS))
def test_a_refusal_comes_as_a_status_or_in_an_envelope(http, kind, name):
    http.task = ended(http)
    plan(http, f"{kind}:{name}")
    reply = ask(http, kind)
    assert (reply.status_code, reply.json()["code"]) == ANSWERS[name]
    assert reply.headers.get("retry-after") == ("1" if name == "limited" else None) or (
        name == "limited-oddly"
    )
    assert accepted(http) == 1 + (name in AFTER)
    http.delete("/sandbox/faults")
    assert ask(http, kind).status_code == 200


@pytest.mark.parametrize(
    ("kind", "name"), kinds_of("unavailable", "trouble-after", "html", "forbidden-page")
)
def test_a_page_of_html_comes_instead_of_json(http, kind, name):
    http.task = ended(http)
    plan(http, f"{kind}:{name}")
    reply = ask(http, kind)
    assert reply.headers["content-type"] == "text/html"
    assert reply.text.startswith("<html>")
    assert (
        reply.status_code
        == {"unavailable": 503, "trouble-after": 502, "html": 200, "forbidden-page": 403}[name]
    )
    assert accepted(http) == 1 + (kind == "submit" and name != "unavailable")


@pytest.mark.parametrize(("kind", "name"), kinds_of("reset", "lost-reply", "closed", "hang"))
def test_missing_reply_is_billed_only_when_accepted(http, kind, name):
    http.task = ended(http)
    plan(http, f"{kind}:{name}", hang=0.01)
    error = httpx.RemoteProtocolError if name in ("closed", "hang") else httpx.ReadError
    with pytest.raises(error):
        ask(http, kind)
    assert accepted(http) == 1 + (kind == "submit" and name != "reset")


def test_hanging_reply_outlasts_the_client_timeout(http):
    plan(http, "submit:hang", hang=600)
    with pytest.raises(httpx.ReadTimeout):
        http.post(SUBMIT, json=BODY, timeout=0.3)
    assert accepted(http) == 1


@pytest.mark.parametrize(("kind", "name"), kinds_of("half"))
def test_half_a_reply_comes(http, kind, name):
    http.task = ended(http)
    plan(http, f"{kind}:{name}")
    with pytest.raises(httpx.RemoteProtocolError, match="without sending complete"):
        ask(http, kind)
    assert accepted(http) == 1 + (kind == "submit")


@pytest.mark.parametrize(("kind", "name"), kinds_of("slow"))
def test_a_slow_reply_comes_in_pieces_and_is_right(http, kind, name):
    http.task = ended(http)
    right = ask(http, kind)
    plan(http, f"{kind}:{name}", slow=0.1)
    reply = ask(http, kind)
    if kind != "submit":
        assert reply.content == right.content
    assert reply.status_code == 200
    assert reply.headers["content-type"] == right.headers["content-type"]


@pytest.mark.parametrize(("kind", "name"), kinds_of("garbage"))
def test_garbage_of_the_right_length_comes(http, kind, name):
    http.task = ended(http)
    right = ask(http, kind)
    plan(http, f"{kind}:{name}")
    reply = ask(http, kind)
    assert len(reply.content) == len(right.content)
    assert reply.content != right.content


@pytest.mark.parametrize(("kind", "name"), kinds_of("endless"))
def test_an_endless_reply_goes_on_until_the_client_leaves(http, kind, name):
    http.task = ended(http)
    plan(http, f"{kind}:{name}")
    method, url, how = {
        "submit": ("POST", SUBMIT, {"json": BODY}),
        "status": ("GET", STATUS, {"params": {"taskId": http.task[0]}}),
        "download": ("GET", http.task[1], {}),
    }[kind]
    seen = 0
    with http.stream(method, url, **how) as reply:
        for piece in reply.iter_raw():
            seen += len(piece)
            if seen > 2_000_000:
                break
    assert accepted(http) == 1 + (kind == "submit")  # it goes on serving others


@pytest.mark.parametrize(("kind", "name"), kinds_of("huge-headers"))
def test_a_header_of_a_megabyte_is_more_than_a_client_takes(http, kind, name):
    http.task = ended(http)
    plan(http, f"{kind}:{name}")
    with pytest.raises(httpx.RemoteProtocolError):
        ask(http, kind)


def test_an_accepted_task_may_go_unnamed_or_be_named_wrongly(http):
    plan(http, "submit:no-task-id@1", "submit:wrong-task-id@2")
    assert submit(http).json()["data"] == {}
    named = submit(http).json()["data"]["taskId"]
    assert accepted(http) == 2
    assert status(http, named).status_code == 404


def test_every_fault_of_a_request_has_been_tried_here():
    tried = {
        *ANSWERS, *DATA, *AFTER, "unavailable", "html", "forbidden-page", "reset", "lost-reply",
        "closed", "hang",
        "half", "slow", "garbage", "endless", "huge-headers", "no-task-id", "many-result-urls",
        "deep-json", "skewed-clock", "never-ends", "lost-result", "truncated", "empty",
        "wrong-kind", "gzip-bomb", "pixel-bomb", "redirect-away", "redirect-round",
    }  # fmt: skip
    known = {name for kind in FAULTS if kind != "callback" for name in FAULTS[kind]}
    assert known == tried
