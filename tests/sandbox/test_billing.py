import asyncio
from decimal import Decimal

import pytest

from tests.sandbox.helpers import sandbox_client

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

BALANCE = "/api/v1/apikeys/current-balance"


async def test_the_bill_counts_every_accepted_task_to_the_cent():
    async with sandbox_client(price_pro=Decimal("0.1"), price_max=Decimal("0.000001")) as sandbox:
        for _ in range(3):
            await sandbox.accepted(mode="pro")
        await sandbox.accepted(mode="max")
        bill = await sandbox.bill()
        assert (bill["accepted"], bill["dollars"]) == (4, "0.300001")
        assert bill["by_mode"] == {"pro": 3, "max": 1}


async def test_the_official_route_may_cost_more():
    async with sandbox_client(price_pro_official=Decimal("0.05")) as sandbox:
        for provider in ("value", "official", "auto"):
            await sandbox.accepted(top={"provider": provider})
        await sandbox.accepted(mode="max", top={"provider": "official"})
        assert (await sandbox.bill())["dollars"] == "0.170000"


async def test_the_bill_counts_status_requests_answered_and_refused():
    async with sandbox_client(requests_per_minute=3) as sandbox:
        task_id = await sandbox.accepted()
        for _ in range(4):
            await sandbox.status(task_id)
        bill = await sandbox.bill()
        assert (bill["status_requests"], bill["statuses_refused"]) == (4, 2)


async def test_the_balance_goes_down_with_each_accepted_task():
    async with sandbox_client(balance=1) as sandbox:
        await sandbox.accepted(mode="max")
        reply = await sandbox.http.get(BALANCE)
        assert reply.json()["data"] == 0.94


async def test_low_balance_refuses_the_submit_free_of_charge():
    async with sandbox_client(balance=Decimal("0.05")) as sandbox:
        await sandbox.accepted(mode="pro")
        refused = await sandbox.submit(mode="pro")
        assert (refused.status_code, refused.json()["code"]) == (402, 402)
        assert (await sandbox.bill())["accepted"] == 1
        assert (await sandbox.http.get(BALANCE)).json()["data"] == 0.02


async def test_task_list_has_request_and_price():
    async with sandbox_client(mean=10, spread=0) as sandbox:
        task_id = await sandbox.accepted(
            "a fox", mode="max", aspect_ratio="1:1", top={"provider": "value"}
        )
        (task,) = await sandbox.tasks()
        created = (await sandbox.data(task_id))["createTime"]
        assert task == {
            "taskId": task_id,
            "prompt": "a fox",
            "image_urls": [],
            "mode": "max",
            "aspect_ratio": "1:1",
            "output_format": "jpeg",
            "provider": "value",
            "callback_url": None,
            "accepted_at": created,
            "ended_at": None,
            "state": "pending",
            "price": "0.060000",
        }
        await asyncio.sleep(11)
        (task,) = await sandbox.tasks()
        assert (task["state"], task["ended_at"]) == ("success", created + 10_000)


async def test_a_long_list_of_tasks_is_complete_and_in_order():
    async with sandbox_client(slots=600) as sandbox:
        for number in range(501):
            await sandbox.accepted(str(number))
        tasks = await sandbox.tasks()
        assert [task["prompt"] for task in tasks] == [str(number) for number in range(501)]


async def test_a_reset_forgets_everything():
    async with sandbox_client(balance=1) as sandbox:
        task_id = await sandbox.accepted(image_urls=["http://sandbox.test/references/cat.png"])
        await sandbox.http.post("/sandbox/reset")
        assert (await sandbox.bill())["accepted"] == 0
        assert await sandbox.tasks() == []
        assert (await sandbox.status(task_id)).status_code == 404
        assert (await sandbox.http.get(BALANCE)).json()["data"] == 1
