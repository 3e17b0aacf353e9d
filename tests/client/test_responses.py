"""The parsers of a status and a balance, for fields of any content."""

import json
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_flux_kontext.client.responses import (
    read_balance,
    read_envelope,
    read_status,
    read_task_id,
)
from prefect_flux_kontext.errors import (
    ApiError,
    InsufficientBalanceError,
    InvalidRequestError,
    RefusedError,
    UnreadableReplyError,
)

URL = "https://results.test/1.jpg"

ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**300, max_value=10**320)
    | st.floats()
    | st.text(st.characters(), max_size=20)
    | st.sampled_from(["success", "failed", "task_1", "200", "429", '{"resultUrls": ["x"]}']),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3)
    ),
    max_leaves=5,
)
FIELDS = (
    "taskId",
    "state",
    "resultJson",
    "failCode",
    "failMsg",
    "createTime",
    "completeTime",
    "costTime",
)


def success(result_json):
    return read_status({"state": "success", "resultJson": result_json}, task_id="task_1")


def test_success_has_urls_and_times():
    status = read_status(
        {
            "taskId": "task_1",
            "state": "success",
            "resultJson": json.dumps({"resultUrls": [URL]}),
            "createTime": 1_767_225_600_000,
            "completeTime": 1_767_225_630_500,
            "costTime": 30_500,
            "somethingNew": {"a": 1},
        },
        task_id="task_1",
    )
    assert status.result_urls == [URL]
    assert status.created_at == datetime(2026, 1, 1, tzinfo=UTC)
    assert status.completed_at == datetime(2026, 1, 1, 0, 0, 30, 500_000, tzinfo=UTC)
    assert status.generation_seconds == 30.5
    assert status.fail_code is None


@pytest.mark.parametrize(
    "result_json",
    [
        json.dumps({"resultUrls": [URL]}),
        {"resultUrls": [URL], "more": 1},
        [URL],
        json.dumps([URL]),
        {"resultUrls": [None, 3, "", "bad\ud800", "http://a/\x00", URL, {"url": "x"}]},
        {"resultUrls": URL},
        {"resultUrls": [{"url": URL}]},
        {"resultUrls": [{"url": URL, "width": 1_024}]},
        {"resultUrls": {"url": URL}},
        {"resultUrls": json.dumps([URL])},
        json.dumps(json.dumps({"resultUrls": [URL]})),
        {"images": [{"url": URL, "content_type": "image/jpeg"}]},
        {"urls": [URL]},
        URL,
        f" {URL}\n",
    ],
)
def test_urls_are_found_in_a_string_an_object_or_a_list(result_json):
    assert success(result_json).result_urls == [URL]


@pytest.mark.parametrize("name", ["resultUrls", "resultUrl", "response", "result", "output"])
@pytest.mark.parametrize("value", [URL, [URL], json.dumps({"resultUrls": [URL]})])
def test_urls_are_found_beside_an_empty_result_json(name, value):
    data = {"state": "success", "resultJson": None, "image_urls": ["https://a.test/in.jpg"]}
    assert read_status({**data, name: value}, task_id="task_1").result_urls == [URL]


@pytest.mark.parametrize("between", [",", ", ", "\n", " ", ";"])
def test_several_urls_in_one_text_are_separated(between):
    urls = ["https://results.test/1.png?a=1,2", "https://results.test/2.png"]
    assert success({"resultUrls": between.join(urls)}).result_urls == urls


def test_urls_keep_their_order():
    urls = [f"https://results.test/{number}.png" for number in range(20)]
    assert success({"resultUrls": urls}).result_urls == urls


@pytest.mark.parametrize(
    "result_json",
    [
        None,
        "",
        "not JSON",
        "{",
        "[" * 100000,
        7,
        {},
        [],
        {"resultUrls": []},
        {"resultUrls": None},
        {"resultUrls": [""]},
        {"resultUrls": ["/results/1.png"]},
        {"resultUrls": [[[[[[[[URL]]]]]]]]},
        {"image_urls": [URL]},
        "null",
        '"text"',
    ],
)
def test_success_without_urls_is_retryable(result_json):
    with pytest.raises(UnreadableReplyError, match="no result URL") as caught:
        success(result_json)
    assert caught.value.task_id == "task_1"
    assert caught.value.retryable


@pytest.mark.parametrize("task_id", ["task_2", "", 7, ["task_1"], {"a": "task_1"}, True])
def test_status_of_another_task_is_rejected(task_id):
    with pytest.raises(UnreadableReplyError, match="task_1"):
        read_status({"taskId": task_id, "state": "failed"}, task_id="task_1")


@pytest.mark.parametrize("fields", [{}, {"taskId": None}, {"taskId": "7"}, {"taskId": 7}])
def test_status_may_omit_the_task_id_or_send_a_number(fields):
    assert read_status({**fields, "state": "pending"}, task_id="7").state == "pending"


@pytest.mark.parametrize("state", ["queued", "Generating", "cancelled", "error", "処理中"])
def test_unknown_state_is_kept(state):
    assert read_status({"state": state}, task_id="task_1").state == state


@pytest.mark.parametrize("state", ["SUCCESS", "Succeeded", "completed", " success ", "DONE"])
def test_success_may_be_written_in_other_ways(state):
    status = read_status({"state": state, "resultJson": [URL]}, task_id="task_1")
    assert (status.state, status.result_urls) == ("success", [URL])
    with pytest.raises(UnreadableReplyError, match="no result URL"):
        read_status({"state": state}, task_id="task_1")


@pytest.mark.parametrize(
    "fields",
    [
        {"state": "FAILED"},
        {"state": "fail"},
        {"state": "Failure"},
        {"state": "error", "failCode": "GENERATION_FAILED"},
        {"state": "CANCELLED", "failCode": 501},
    ],
)
def test_failure_may_be_written_in_other_ways(fields):
    assert read_status(fields, task_id="task_1").state == "failed"


@pytest.mark.parametrize("state", [None, 1, [], {}, "", " ", "\x00"])
def test_status_without_state_is_rejected(state):
    with pytest.raises(UnreadableReplyError, match="no state"):
        read_status({"state": state}, task_id="task_1")


@pytest.mark.parametrize(
    ("fields", "code", "message"),
    [
        ({"failCode": "CONTENT_VIOLATION", "failMsg": "no"}, "CONTENT_VIOLATION", "no"),
        ({"failCode": "SensitiveContentDetected"}, "SensitiveContentDetected", None),
        ({"failCode": 501, "failMsg": 7}, "501", "7"),
        ({"failCode": "", "failMsg": ""}, None, None),
        ({"failCode": None, "failMsg": ["a"]}, None, "['a']"),
        ({"failMsg": "two\nlines\x1b[31m\ttab\u202e"}, None, "two lines [31m tab"),
        ({"failMsg": "x" * 10_000}, None, "x" * 500),
    ],
)
def test_fail_code_and_message_are_printable(fields, code, message):
    status = read_status({"state": "failed", **fields}, task_id="task_1")
    assert (status.fail_code, status.fail_message) == (code, message)


@pytest.mark.parametrize("value", [None, "x", [], {}, 10**400, -(10**400), "1" * 5_000])
def test_invalid_times_are_ignored(value):
    fields = {"state": "failed", "createTime": value, "completeTime": value, "costTime": value}
    status = read_status(fields, task_id="task_1")
    assert status.created_at is status.completed_at is status.generation_seconds is None


def test_deeply_nested_reply_raises_an_api_error():
    for depth in range(1, 1_200):
        nested = b"[" * depth + b"]" * depth
        for body in (b'{"code": 400, "message": %s}', b'{"code": 400, "data": {"error": %s}}'):
            with pytest.raises(ApiError):
                read_envelope(200, body % nested)


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(FIELDS, ANYTHING)) | ANYTHING)
def test_any_status_is_read_or_raises_unreadable_reply(data):
    try:
        status = read_status(data, task_id="task_1")
    except UnreadableReplyError:
        return
    assert status.state
    status.model_dump_json()


@pytest.mark.parametrize(
    ("number", "taken"), [(1, True), (100, True), (101, False), (10**5, False)]
)
def test_more_than_100_urls_are_rejected(number, taken):
    urls = json.dumps({"resultUrls": ["https://example.com/1.jpg"] * number})
    data = {"taskId": "t", "state": "success", "resultJson": urls}
    if taken:
        assert len(read_status(data, task_id="t").result_urls) == number
    else:
        with pytest.raises(UnreadableReplyError, match=f"{number:,} result URLs"):
            read_status(data, task_id="t")


@given(ANYTHING, st.integers(100, 999))
def test_any_envelope_is_read_or_raises_api_error(value, status):
    body = json.dumps(value).encode()
    try:
        read_task_id(read_envelope(status, body))
    except ApiError as error:
        error.message.encode()


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 422])
@pytest.mark.parametrize("body", [b"<html>Forbidden</html>", b"", b"no", b"[]", b'"no"'])
def test_refused_status_request_without_envelope_is_retryable(status, body):
    with pytest.raises(UnreadableReplyError, match=f"HTTP {status}") as caught:
        read_envelope(status, body, task_id="task_1")
    assert caught.value.retryable
    with pytest.raises(RefusedError):  # a submit: it was not accepted
        read_envelope(status, body)


@pytest.mark.parametrize("code", [400, 403, 409, 422])
def test_refused_status_request_never_says_that_nothing_was_billed(code):
    body = json.dumps({"code": code, "message": "no"}).encode()
    for status in (200, code):
        with pytest.raises(RefusedError) as caught:
            read_envelope(status, body, task_id="task_1")
        assert caught.value.message == (
            f"{code}: no. The service refused to tell the status of task task_1."
        )


@pytest.mark.parametrize(
    ("envelope", "reason"),
    [
        ({"message": "SensitiveContentDetected"}, "SensitiveContentDetected"),
        (
            {"message": "no", "data": {"error": "InputImageSensitiveContentDetected"}},
            "InputImageSensitiveContentDetected",
        ),
        ({"message": "no", "data": {"failCode": "NSFW"}}, "NSFW"),
        ({"message": "no", "data": {"code": "PROMPT_TOO_LONG"}}, "PROMPT_TOO_LONG"),
        ({"message": "Bad request", "data": {"error": "prompt: too long"}}, "400"),
        ({"message": "invalid"}, "400"),
    ],
)
def test_refusal_may_name_a_fail_code(envelope, reason):
    with pytest.raises(InvalidRequestError) as caught:
        read_envelope(400, json.dumps({"code": 400, **envelope}).encode())
    assert caught.value.reason == reason


@pytest.mark.parametrize("code", ["INSUFFICIENT_CREDITS", "InsufficientBalance"])
def test_low_balance_in_any_refusal_stops_the_batch(code):
    with pytest.raises(InsufficientBalanceError) as caught:
        read_envelope(400, json.dumps({"code": 400, "data": {"error": code}}).encode())
    assert caught.value.fatal


@given(st.binary(max_size=200), st.integers(100, 999))
def test_any_bytes_raise_api_error(body, status):
    with pytest.raises(ApiError):
        read_task_id(read_envelope(status, body))


@pytest.mark.parametrize(
    ("data", "dollars"),
    [
        (74.87, 74.87),
        ("12.5", 12.5),
        (0, 0.0),
        ({"balance": 3}, 3.0),
        ({"balance": None, "amount": "7.25"}, 7.25),
        ({"currentBalance": -1}, -1.0),
        ({"current_balance": 0, "balance": "n/a"}, 0.0),
    ],
)
def test_balance_is_read_in_its_likely_shapes(data, dollars):
    assert read_balance(data) == dollars


@pytest.mark.parametrize(
    "data", [None, True, {}, [], "n/a", {"balance": {}}, {"balance": 10**400}, float("nan"), "inf"]
)
def test_balance_without_a_number_is_rejected(data):
    with pytest.raises(UnreadableReplyError, match="no number"):
        read_balance(data)


@pytest.mark.parametrize(
    "signed",
    [
        "?X-Amz-Algorithm=AWS4&X-Amz-Signature=s3cr3t",
        "?AWSAccessKeyId=AK&Signature=s3cr3t&Expires=1",
        "?x-goog-algorithm=GOOG4&x-goog-signature=s3cr3t",
        "?sv=2024-01-01&se=1&sr=b&sig=s3cr3t",
        "?v=7&sig=s3cr3t",
        "%3FX-Amz-Signature%3Ds3cr3t",
    ],
)
def test_signature_of_a_url_in_a_message_is_removed(signed):
    message = f"https://bucket.test/cat.jpg{signed} cannot be fetched"
    status = read_status(
        {"taskId": "t", "state": "failed", "failMsg": message}, task_id="t"
    ).fail_message
    assert status.startswith("https://bucket.test/cat.jpg")
    assert status.endswith("… cannot be fetched")
    with pytest.raises(RefusedError) as caught:
        read_envelope(400, json.dumps({"code": 400, "message": message}).encode())
    for text in (status, str(caught.value)):
        assert "s3cr3t" not in text
