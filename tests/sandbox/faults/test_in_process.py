"""Faults without a socket, for tests that mount the sandbox."""

import pytest

from prefect_flux_kontext.sandbox.faults.plan import FaultPlan
from tests.sandbox.helpers import sandbox_client

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


@pytest.mark.parametrize("name", ["reset", "lost-reply", "closed", "hang", "half"])
async def test_a_connection_that_breaks_raises(name):
    async with sandbox_client() as sandbox:
        sandbox.sandbox.active_faults.change(FaultPlan(faults=[f"submit:{name}"]))
        with pytest.raises(ConnectionResetError):
            await sandbox.submit()
        assert (await sandbox.bill())["accepted"] == (name != "reset")


async def test_replies_are_as_bad_as_over_a_socket():
    async with sandbox_client() as sandbox:
        faults = ["submit:limited@1", "submit:slow@2", "submit:html@3"]
        sandbox.sandbox.active_faults.change(FaultPlan(faults=faults))
        replies = [await sandbox.submit() for _ in range(3)]
        assert [reply.status_code for reply in replies] == [429, 200, 200]
        assert replies[1].json()["data"]["taskId"].startswith("task_")
        assert "<html>" in replies[2].text
        assert (await sandbox.bill())["accepted"] == 2
