"""Statuses that say what is not so, tasks that never end and results that are not there."""

import json

import pytest

from tests.sandbox.faults.asking import ended, plan, status, submit

DATA = {
    "no-data": None,
    "no-state": {"state": None},
    "unknown-state": {"state": "contemplating"},
    "pending-again": {"state": "pending", "resultJson": None, "completeTime": None},
    "wrong-task-id": {"taskId": "task_0000000000000000"},
    "other-spelling": {"state": "SUCCESS"},
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


def test_a_task_is_not_known_yet(http):
    task_id, _ = ended(http)
    plan(http, "status:not-found-in-200")
    reply = status(http, task_id)
    assert (reply.status_code, reply.json()["code"]) == (200, 422)


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


def test_skewed_clock_shifts_times_but_not_durations(http):
    task_id, _ = ended(http)
    truth = status(http, task_id).json()["data"]
    plan(http, "status:skewed-clock")
    for shift in (-5, 5):
        data = status(http, task_id).json()["data"]
        for moment in ("createTime", "completeTime"):
            assert data[moment] - truth[moment] == shift * 3_600_000
        assert data["costTime"] == truth["costTime"]


def test_never_ending_task_stays_in_processing(http):
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
