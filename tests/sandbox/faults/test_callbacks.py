"""What may befall a callback: nothing of it changes what the service knows of the task."""

import asyncio
import json

import pytest

from prefect_flux_kontext.sandbox.faults.plan import FaultPlan
from tests.sandbox.helpers import sandbox_client
from tests.sandbox.test_callbacks import Receiver, through

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


async def told(fault, *answers, late=600):
    """What a receiver is told in bad weather: seconds after the end, part of the URL, task."""
    receiver = Receiver(*answers)
    async with sandbox_client(mean=30, spread=0) as sandbox:
        sandbox.sandbox.weather.change(FaultPlan(faults=[fault], late=late))
        task_id = await through(receiver, sandbox)
        ended = asyncio.get_running_loop().time() + 30
        await sandbox.background()
        bill = (await sandbox.bill())["callbacks"]
    calls = [
        (round(at - ended), token, json.loads(json.dumps(told))["data"])
        for at, token, told in receiver.calls
    ]
    return task_id, calls, bill


async def test_a_callback_is_lost():
    _, calls, bill = await told("callback:lost")
    assert (calls, bill) == ([], {"delivered": 0, "failed": 1})


async def test_a_callback_comes_twice():
    task_id, calls, bill = await told("callback:doubled")
    assert [data["taskId"] for _, _, data in calls] == [task_id, task_id]
    assert calls[0] == calls[1]
    assert bill == {"delivered": 1, "failed": 0}


async def test_a_callback_that_only_arrived_at_first_was_delivered():
    _, calls, bill = await told("callback:doubled", 200, 500, 500, 500, 500)
    assert len(calls) == 5
    assert bill == {"delivered": 1, "failed": 0}


async def test_a_callback_is_late():
    task_id, ((seconds, _, data),), _ = await told("callback:late", late=1_000)
    assert (seconds, data["taskId"]) == (1_000, task_id)


async def test_a_callback_is_overtaken_by_others():
    task_id, ((seconds, _, data),), _ = await told("callback:overtaken", late=1_000)
    assert 0 < seconds < 1_000
    assert data["taskId"] == task_id


async def test_a_stranger_calls_first_at_the_right_url():
    task_id, (forged, true), bill = await told("callback:forged")
    assert (forged[1], true[1]) == ("secret", "secret")
    assert forged[2]["taskId"] != task_id == true[2]["taskId"]
    assert "file:///" in forged[2]["resultJson"]
    assert bill == {"delivered": 1, "failed": 0}


async def test_a_stranger_calls_first_at_a_guessed_url():
    task_id, (forged, true), _ = await told("callback:misdirected")
    assert (forged[1], true[1]) == ("guessed", "secret")
    assert forged[2]["taskId"] != task_id == true[2]["taskId"]


async def test_nobody_is_called_back_for_a_task_that_never_ends():
    _, calls, bill = await told("task:never-ends")
    assert (calls, bill) == ([], {"delivered": 0, "failed": 0})
