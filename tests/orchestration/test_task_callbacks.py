"""Callbacks for single requests: they wake waits and settle lost replies."""

import socket
from contextlib import asynccontextmanager

import pytest

from prefect_flux_kontext import (
    GenerationRequest,
    PollingCadence,
    submit_generation,
    wait_for_generation,
)
from prefect_flux_kontext.callbacks.inbox import Inbox
from prefect_flux_kontext.callbacks.receiver import create_receiver, serve_in_background
from prefect_flux_kontext.errors import ConfigurationError, ReplyLostError
from prefect_flux_kontext.ledger.store import open_ledger_store
from prefect_flux_kontext.sandbox.faults.plan import FaultPlan
from prefect_flux_kontext.storage.filesystem import OutputFolder
from tests.orchestration.conftest import QUICK

pytestmark = pytest.mark.anyio

SECRET = "a-secret-of-the-tests-0123456789"
REQUEST = GenerationRequest(prompt="a lighthouse", aspect_ratio="1:1")
PATIENT = PollingCadence(initial_delay=500, interval=500, timeout=600)
"""Polls too late for a test, so only a callback can end the wait."""


@asynccontextmanager
async def receiving(output, monkeypatch):
    """Receive the callbacks of a ledger's tasks while the block runs."""
    inbox = Inbox(open_ledger_store(OutputFolder(str(output))).below("callbacks"))
    async with serve_in_background(create_receiver(inbox, SECRET), "127.0.0.1", 0) as url:
        monkeypatch.setenv("FLUX_KONTEXT_CALLBACK_URL", url)
        monkeypatch.setenv("FLUX_KONTEXT_CALLBACK_SECRET", SECRET)
        yield


@pytest.fixture
def no_receiver(monkeypatch):
    """A callback URL at which nothing listens."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv(
            "FLUX_KONTEXT_CALLBACK_URL", f"http://127.0.0.1:{closed.getsockname()[1]}"
        )
        monkeypatch.setenv("FLUX_KONTEXT_CALLBACK_SECRET", SECRET)
        yield


def count_polls(sandbox):
    return sandbox.active_faults.numbers["status"]


async def test_callback_wakes_the_wait(account, sandbox, tmp_path, monkeypatch):
    async with receiving(tmp_path, monkeypatch):
        submitted = await submit_generation(REQUEST, account, str(tmp_path))
        result = await wait_for_generation(submitted, account, PATIENT)
    assert result.task_id == submitted.task_id
    assert count_polls(sandbox) == 1


async def test_callback_settles_a_lost_reply(account, sandbox, tmp_path, monkeypatch):
    sandbox.active_faults.change(FaultPlan(faults=["submit:lost-reply@1"]))
    async with receiving(tmp_path, monkeypatch):
        submitted = await submit_generation(REQUEST, account, str(tmp_path))
    [record] = sandbox.service.records()
    assert submitted.task_id == record["taskId"]


async def test_late_callback_settles_the_next_submit(account, sandbox, tmp_path, monkeypatch):
    sandbox.active_faults.change(FaultPlan(faults=["submit:lost-reply@1"]))
    async with receiving(tmp_path, monkeypatch):
        monkeypatch.setenv("FLUX_KONTEXT_CALLBACK_GRACE", "0")
        with pytest.raises(ReplyLostError, match="flux-kontext resolve"):
            await submit_generation(REQUEST, account, str(tmp_path))
        monkeypatch.setenv("FLUX_KONTEXT_CALLBACK_GRACE", "60")
        submitted = await submit_generation(REQUEST, account, str(tmp_path))
    [record] = sandbox.service.records()
    assert submitted.task_id == record["taskId"]


async def test_missed_callback_lets_later_waits_poll(
    account, sandbox, tmp_path, monkeypatch, no_receiver
):
    monkeypatch.setenv("FLUX_KONTEXT_CALLBACK_SWEEP", "0.2")
    first = await submit_generation(REQUEST, account, str(tmp_path))
    assert await wait_for_generation(first, account, PATIENT)
    monkeypatch.setenv("FLUX_KONTEXT_CALLBACK_SWEEP", "500")
    second = await submit_generation(REQUEST, account, str(tmp_path), "second")
    assert await wait_for_generation(second, account, QUICK)


async def test_short_secret_is_refused_before_payment(account, sandbox, tmp_path, monkeypatch):
    monkeypatch.setenv("FLUX_KONTEXT_CALLBACK_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("FLUX_KONTEXT_CALLBACK_SECRET", "short")
    with pytest.raises(ConfigurationError, match="24 characters"):
        await submit_generation(REQUEST, account, str(tmp_path))
    assert sandbox.service.bill()["accepted"] == 0
