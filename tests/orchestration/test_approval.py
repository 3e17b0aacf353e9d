"""The plan of a flow run: dry runs, budgets, and the approval of one exact plan."""

import asyncio

import pytest
from prefect import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName
from prefect.flow_runs import aresume_flow_run

from prefect_flux_kontext.errors import BatchStoppedError, BudgetReachedError
from prefect_flux_kontext.flows import style_transfer_batch
from prefect_flux_kontext.orchestration import approval
from tests.orchestration.conftest import QUICK

pytestmark = pytest.mark.anyio

CADENCE = QUICK.model_dump()


def rows(number):
    return [{"id": n, "prompt": f"a lighthouse {n}"} for n in range(number)]


async def test_dry_run_counts_rows_and_pays_nothing(account, sandbox, tmp_path):
    summary = await style_transfer_batch(
        [*rows(3), {"id": "wrong"}],
        str(tmp_path),
        credentials=account,
        skip_invalid=True,
        dry_run=True,
    )
    assert (summary.rows, summary.not_submitted, summary.failed) == (4, 3, 1)
    assert sandbox.service.bill()["accepted"] == 0


async def test_budget_ends_the_run(account, sandbox, tmp_path):
    with pytest.raises(BudgetReachedError):
        await style_transfer_batch(
            rows(9), str(tmp_path), credentials=account, budget_usd=0.10, cadence=CADENCE
        )
    assert sandbox.service.bill()["accepted"] == 3


async def test_plan_below_the_limit_runs_without_approval(account, sandbox, tmp_path):
    summary = await style_transfer_batch(
        rows(3), str(tmp_path), credentials=account, approve_above_usd=0.09, cadence=CADENCE
    )
    assert summary.stored == 3


class TestApproval:
    @pytest.fixture(autouse=True)
    def _poll_often(self, monkeypatch):
        monkeypatch.setattr(approval, "APPROVAL_POLL_SECONDS", 1)

    async def wait_for_pause(self, name):
        """Wait until the flow run of a name is paused, and return its id."""
        async with get_client() as client:
            for _ in range(300):
                found = await client.read_flow_runs(
                    flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[name]))
                )
                if found and found[0].state.is_paused():
                    return found[0].id
                await asyncio.sleep(0.1)
        raise AssertionError("the flow run was not paused")

    async def run_and_answer(self, account, manifest, output, name, answer, *, meanwhile=None):
        flow = style_transfer_batch.with_options(flow_run_name=name)
        running = asyncio.create_task(
            flow(
                manifest,
                output,
                credentials=account,
                approve_above_usd=0.05,
                cadence=CADENCE,
                return_state=True,
            )
        )
        run_id = await self.wait_for_pause(name)
        if meanwhile is not None:
            meanwhile()
        await aresume_flow_run(run_id, answer)
        return await running

    async def test_approved_plan_is_run(self, account, sandbox, tmp_path):
        plan = await self.run_and_answer(
            account,
            rows(2),
            str(tmp_path),
            "approved",
            {"approve": True, "plan": await compute_digest(2)},
        )
        assert (await plan.aresult()).stored == 2
        assert sandbox.service.bill()["accepted"] == 2

    @pytest.mark.parametrize(
        ("name", "answer"),
        [("denied", {"approve": False}), ("of another plan", {"approve": True, "plan": "other"})],
    )
    async def test_plan_that_is_not_approved_is_not_paid(
        self, name, answer, account, sandbox, tmp_path
    ):
        answer = {"plan": await compute_digest(2), **answer}
        state = await self.run_and_answer(account, rows(2), str(tmp_path), name, answer)
        with pytest.raises(BatchStoppedError, match="was not approved"):
            await state.aresult()
        assert sandbox.service.bill()["accepted"] == 0

    async def test_changed_manifest_needs_a_new_approval(self, account, sandbox, tmp_path):
        path = tmp_path / "m.csv"
        path.write_text("id,prompt\n0,a lighthouse 0\n1,a lighthouse 1\n")

        def grow():
            path.write_text(path.read_text() + "2,a third\n")

        answer = {"approve": True, "plan": await compute_digest(2)}
        state = await self.run_and_answer(
            account, str(path), str(tmp_path / "out"), "changed", answer, meanwhile=grow
        )
        with pytest.raises(BatchStoppedError, match="has changed since it was approved"):
            await state.aresult()
        assert sandbox.service.bill()["accepted"] == 0


async def compute_digest(number):
    from prefect_flux_kontext.manifest.reader import Manifest  # noqa: PLC0415
    from tests.support.plans import build_plan  # noqa: PLC0415

    plan = await asyncio.to_thread(build_plan, Manifest(rows(number)))
    return plan.digest[:16]
