"""Faults of callbacks."""

import asyncio
import json

import pytest

from prefect_flux_kontext.sandbox.faults.plan import FaultPlan
from tests.sandbox.helpers import sandbox_client
from tests.sandbox.test_callbacks import Receiver, through

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


async def deliver(fault, *answers, late=600):
    """Return the task id, the calls (seconds after the end, token, data) and the bill."""
    receiver = Receiver(*answers)
    async with sandbox_client(mean=30, spread=0) as sandbox:
        sandbox.sandbox.active_faults.change(FaultPlan(faults=[fault], late=late))
        task_id = await through(receiver, sandbox)
        ended = asyncio.get_running_loop().time() + 30
        await sandbox.background()
        bill = (await sandbox.bill())["callbacks"]
    calls = [
        (round(at - ended), token, json.loads(json.dumps(envelope))["data"])
        for at, token, envelope in receiver.calls
    ]
    return task_id, calls, bill


async def test_a_callback_is_lost():
    _, calls, bill = await deliver("callback:lost")
    assert (calls, bill) == ([], {"delivered": 0, "failed": 1})


async def test_a_callback_comes_twice():
    task_id, calls, bill = await deliver("callback:doubled")
    assert [data["taskId"] for _, _, data in calls] == [task_id, task_id]
    assert calls[0] == calls[1]
    assert bill == {"delivered": 1, "failed": 0}


async def test_a_callback_that_only_arrived_at_first_was_delivered():
    _, calls, bill = await deliver("callback:doubled", 200, 500, 500, 500, 500)
    assert len(calls) == 5
    assert bill == {"delivered": 1, "failed": 0}


async def test_a_callback_is_late():
    task_id, ((seconds, _, data),), _ = await deliver("callback:late", late=1_000)
    assert (seconds, data["taskId"]) == (1_000, task_id)


async def test_a_callback_is_overtaken_by_others():
    task_id, ((seconds, _, data),), _ = await deliver("callback:overtaken", late=1_000)
    assert 0 < seconds < 1_000
    assert data["taskId"] == task_id


async def test_forged_callback_arrives_first_at_the_right_url():
    task_id, (forged, true), bill = await deliver("callback:forged")
    assert (forged[1], true[1]) == ("secret", "secret")
    assert forged[2]["taskId"] != task_id == true[2]["taskId"]
    assert "file:///" in forged[2]["resultJson"]
    assert bill == {"delivered": 1, "failed": 0}


async def test_forged_callback_arrives_first_at_a_wrong_url():
    task_id, (forged, true), _ = await deliver("callback:misdirected")
    assert (forged[1], true[1]) == ("guessed", "secret")
    assert forged[2]["taskId"] != task_id == true[2]["taskId"]


async def test_never_ending_task_has_no_callback():
    _, calls, bill = await deliver("task:never-ends")
    assert (calls, bill) == ([], {"delivered": 0, "failed": 0})
