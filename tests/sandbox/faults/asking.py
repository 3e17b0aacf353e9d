"""Requests to a sandbox with faults, by a plain HTTP client."""

import json

import pytest

from prefect_flux_kontext.sandbox.faults.handlers import FAULTS
from tests.sandbox.helpers import STATUS, SUBMIT

BODY = {"input": {"mode": "pro", "prompt": "a cat"}}


def plan(http, *faults, **how):
    reply = http.put("/sandbox/faults", json={"faults": faults, **how})
    assert reply.status_code == 200, reply.text


def submit(http):
    return http.post(SUBMIT, json=BODY)


def ended(http):
    """Return the id and result URL of a task that has ended without faults."""
    task_id = submit(http).json()["data"]["taskId"]
    (url,) = json.loads(status(http, task_id).json()["data"]["resultJson"])["resultUrls"]
    return task_id, url


def status(http, task_id):
    return http.get(STATUS, params={"taskId": task_id})


def accepted(http):
    return http.get("/sandbox/bill").json()["accepted"]


def ask(http, kind):
    """Make one request of a kind for the task of `http.task`."""
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
