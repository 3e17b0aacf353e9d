"""Each fault over a real connection, as a plain HTTP client meets it, and the bill after it."""

import gzip
import io
import json
import zlib

import httpx
import pytest
from PIL import Image

from prefect_flux_kontext.sandbox.faults.plan import FaultPlan
from prefect_flux_kontext.sandbox.faults.registry import FAULTS
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from tests.sandbox.helpers import KEY, STATUS, SUBMIT

BODY = {"input": {"mode": "pro", "prompt": "a cat"}}


@pytest.fixture(scope="module")
def sandbox():
    with running_sandbox(SandboxSettings(mean=0, long_edge=64)) as running:
        yield running


@pytest.fixture
def http(sandbox):
    with httpx.Client(base_url=sandbox.url, headers=KEY, trust_env=False, timeout=20) as client:
        client.post("/sandbox/reset")
        client.delete("/sandbox/faults")
        yield client


def plan(http, *faults, **how):
    reply = http.put("/sandbox/faults", json={"faults": faults, **how})
    assert reply.status_code == 200, reply.text


def submit(http):
    return http.post(SUBMIT, json=BODY)


def ended(http):
    """A task that has ended in fine weather, and its result URL."""
    task_id = submit(http).json()["data"]["taskId"]
    (url,) = json.loads(status(http, task_id).json()["data"]["resultJson"])["resultUrls"]
    return task_id, url


def status(http, task_id):
    return http.get(STATUS, params={"taskId": task_id})


def accepted(http):
    return http.get("/sandbox/bill").json()["accepted"]


def ask(http, kind):
    """One request of a kind, in the weather that `ended` did not meet."""
    if kind == "submit":
        return submit(http)
    task_id, url = http.task
    return status(http, task_id) if kind == "status" else http.get(url)


def kinds_of(*names):
    return [
        pytest.param(kind, name, id=f"{kind}:{name}")
        for name in names
        for kind in ("submit", "status", "download")
        if name in FAULTS[kind]
    ]


ANSWERS = {
    "limited": (429, 429),
    "limited-silently": (429, 429),
    "limited-oddly": (429, 429),
    "limited-in-200": (200, 429),
    "too-many-tasks": (429, 429),
    "too-many-tasks-in-200": (200, 429),
    "refused": (400, 400),
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


@pytest.mark.parametrize(("kind", "name"), kinds_of("unavailable", "trouble-after", "html"))
def test_a_page_of_html_comes_instead_of_json(http, kind, name):
    http.task = ended(http)
    plan(http, f"{kind}:{name}")
    reply = ask(http, kind)
    assert reply.headers["content-type"] == "text/html"
    assert reply.text.startswith("<html>")
    assert reply.status_code == {"unavailable": 503, "trouble-after": 502, "html": 200}[name]
    assert accepted(http) == 1 + (kind == "submit" and name != "unavailable")


@pytest.mark.parametrize(("kind", "name"), kinds_of("reset", "lost-reply", "closed", "hang"))
def test_a_reply_does_not_come_and_the_bill_says_whether_it_was_accepted(http, kind, name):
    http.task = ended(http)
    plan(http, f"{kind}:{name}", hang=0.01)
    error = httpx.RemoteProtocolError if name in ("closed", "hang") else httpx.ReadError
    with pytest.raises(error):
        ask(http, kind)
    assert accepted(http) == 1 + (kind == "submit" and name != "reset")


def test_a_reply_that_hangs_outlasts_a_client_that_has_no_patience(http):
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


DATA = {
    "no-data": None,
    "no-state": {"state": None},
    "unknown-state": {"state": "contemplating"},
    "pending-again": {"state": "pending", "resultJson": None, "completeTime": None},
    "wrong-task-id": {"taskId": "task_0000000000000000"},
    "no-result-urls": {"state": "success", "resultJson": '{"resultUrls": []}'},
    "foreign-result-url": {"resultJson": '{"resultUrls": ["file:///etc/hostname"]}'},
}


@pytest.mark.parametrize("name", DATA)
def test_a_status_says_what_is_not_so(http, name):
    task_id, _ = ended(http)
    truth = status(http, task_id).json()["data"]
    plan(http, f"status:{name}")
    data = status(http, task_id).json()["data"]
    assert data != truth
    if DATA[name] is None:
        assert data is None
    else:
        assert {key: data.get(key) for key in DATA[name]} == DATA[name]
    http.delete("/sandbox/faults")
    assert status(http, task_id).json()["data"] == truth


def test_a_lie_about_the_result_leaves_a_refusal_as_it_is(http):
    plan(http, "status:no-result-urls")
    assert status(http, "task_none").status_code == 404


def test_a_status_has_a_hundred_thousand_result_urls(http):
    task_id, _ = ended(http)
    plan(http, "status:many-result-urls")
    data = status(http, task_id).json()["data"]
    assert len(json.loads(data["resultJson"])["resultUrls"]) == 100_000


def test_a_status_is_nested_deeper_than_parsers_go(http):
    task_id, _ = ended(http)
    plan(http, "status:deep-json")
    with pytest.raises(RecursionError):
        status(http, task_id).json()


def test_a_skewed_clock_is_hours_off_both_ways_and_durations_hold(http):
    task_id, _ = ended(http)
    truth = status(http, task_id).json()["data"]
    plan(http, "status:skewed-clock")
    for shift in (-5, 5):
        data = status(http, task_id).json()["data"]
        for moment in ("createTime", "completeTime"):
            assert data[moment] - truth[moment] == shift * 3_600_000
        assert data["costTime"] == truth["costTime"]


def test_a_task_that_never_ends_is_processing_for_ever_and_others_end(http):
    plan(http, "task:never-ends@1")
    stuck = submit(http).json()["data"]["taskId"]
    other, _ = ended(http)
    for _ in range(3):
        data = status(http, stuck).json()["data"]
        assert (data["state"], "completeTime" in data) == ("processing", False)
    assert status(http, other).json()["data"]["state"] == "success"


def test_a_lost_result_is_404_for_ever_and_others_are_served(http):
    plan(http, "task:lost-result@1")
    _, lost = ended(http)
    _, other = ended(http)
    assert [http.get(lost).status_code for _ in range(3)] == [404] * 3
    assert http.get(other).status_code == 200


def test_an_image_is_cut_off_and_nothing_says_so(http):
    _, url = ended(http)
    whole = http.get(url).content
    plan(http, "download:truncated")
    reply = http.get(url)
    assert "content-length" not in reply.headers
    assert reply.content == whole[: len(whole) // 2]


def test_an_image_is_empty(http):
    _, url = ended(http)
    plan(http, "download:empty")
    assert (http.get(url).status_code, http.get(url).content) == (200, b"")


def test_an_image_is_of_another_kind_than_it_says(http):
    _, url = ended(http)
    plan(http, "download:wrong-kind")
    reply = http.get(url)
    assert reply.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(reply.content)).format == "WEBP"
    missing = http.get("/results/task_none/1.jpg")
    assert (missing.status_code, missing.json()["code"]) == (404, 404)


def test_a_small_body_unpacks_to_a_quarter_of_a_gigabyte(http):
    _, url = ended(http)
    plan(http, "download:gzip-bomb")
    with http.stream("GET", url) as reply:
        assert reply.headers["content-encoding"] == "gzip"
        packed = b"".join(reply.iter_raw())
    assert len(packed) < 400_000
    unpacked = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(packed, 1_000_000)
    assert unpacked == bytes(1_000_000)
    with gzip.open(io.BytesIO(packed)) as file:
        assert sum(len(piece) for piece in iter(lambda: file.read(1 << 20), b"")) == 256 << 20


def test_a_small_png_has_nearly_a_billion_pixels(http):
    _, url = ended(http)
    plan(http, "download:pixel-bomb")
    content = http.get(url).content
    assert len(content) < 1_000
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(content))


def test_a_download_is_redirected_to_a_file_or_round_and_round(http):
    _, url = ended(http)
    plan(http, "download:redirect-away@1", "download:redirect-round")
    reply = http.get(url)
    assert (reply.status_code, reply.headers["location"]) == (302, "file:///etc/hostname")
    with pytest.raises(httpx.TooManyRedirects):
        http.get(url, follow_redirects=True)


def test_the_weather_is_told_changed_and_ended_at_run_time(http):
    fine = http.get("/sandbox/faults").json()
    assert fine == {
        "plan": {"faults": [], "seed": 0, "hang": 60.0, "slow": 5.0, "late": 600.0},
        "seen": {},
        "befallen": {},
    }
    plan(http, "submit:limited@2", seed=7)
    assert [submit(http).status_code for _ in range(3)] == [200, 429, 200]
    told = http.get("/sandbox/faults").json()
    assert told["plan"]["faults"] == ["submit:limited@2"]
    assert told["seen"] == {"submit": 3, "task": 2}
    assert told["befallen"] == {"submit:limited": 1}
    assert http.delete("/sandbox/faults").json() == fine
    assert [submit(http).status_code for _ in range(3)] == [200] * 3


def test_a_plan_that_is_none_is_refused_and_the_weather_stays(http):
    plan(http, "submit:limited")
    for body in ("rain", '{"faults": ["rain", "submit:rain"]}', "[]", "[" * 10_000):
        reply = http.put("/sandbox/faults", content=body)
        assert reply.status_code == 400, body
        assert reply.json()["message"] == "invalid plan of faults"
    assert submit(http).status_code == 429


def test_the_same_seed_and_requests_meet_the_same_fates(http):
    def fates(seed):
        plan(http, "submit:limited=0.2", "submit:trouble-after=0.2", seed=seed)
        return [submit(http).status_code for _ in range(30)]

    assert fates(1) == fates(1)
    assert fates(1) != fates(2)


def test_every_fault_of_a_request_has_been_tried_here():
    tried = {
        *ANSWERS, *DATA, *AFTER, "unavailable", "html", "reset", "lost-reply", "closed", "hang",
        "half", "slow", "garbage", "endless", "huge-headers", "no-task-id", "many-result-urls",
        "deep-json", "skewed-clock", "never-ends", "lost-result", "truncated", "empty",
        "wrong-kind", "gzip-bomb", "pixel-bomb", "redirect-away", "redirect-round",
    }  # fmt: skip
    known = {name for kind in FAULTS if kind != "callback" for name in FAULTS[kind]}
    assert known == tried


def test_a_sandbox_may_start_in_bad_weather():
    with running_sandbox(plan=FaultPlan(faults=["submit:limited"])) as stormy:
        reply = httpx.post(stormy.url + SUBMIT, json=BODY, headers=KEY, trust_env=False)
        assert reply.status_code == 429
        assert stormy.weather.befallen == {"submit:limited": 1}
        stormy.weather.change(FaultPlan())
        reply = httpx.post(stormy.url + SUBMIT, json=BODY, headers=KEY, trust_env=False)
        assert reply.status_code == 200
