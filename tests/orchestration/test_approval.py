"""The plan of a flow run: dry runs, budgets, and the approval of one exact plan."""

import asyncio

import pytest
from prefect import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterKey,
    FlowRunFilter,
    FlowRunFilterName,
)
from prefect.flow_runs import aresume_flow_run
from prefect.states import Cancelled, Cancelling

from prefect_flux_kontext.errors import BatchStoppedError, BudgetReachedError
from prefect_flux_kontext.flows import style_transfer_batch
from prefect_flux_kontext.orchestration import approval
from prefect_flux_kontext.orchestration.run_page import build_artifact_key
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

    async def run_and_answer(
        self, account, manifest, output, name, answer, *, meanwhile=None, **options
    ):
        """Run a batch, and resume it or, with another answer, set this state."""
        flow = style_transfer_batch.with_options(flow_run_name=name)
        running = asyncio.create_task(
            flow(
                manifest,
                output,
                credentials=account,
                cadence=CADENCE,
                return_state=True,
                **{"approve_above_usd": 0.05, **options},
            )
        )
        run_id = await self.wait_for_pause(name)
        if meanwhile is not None:
            meanwhile()
        if answer is None:
            await aresume_flow_run(run_id)
        else:
            async with get_client() as client:
                await client.set_flow_run_state(run_id, answer)
        return await running

    async def test_resuming_approves(self, account, sandbox, tmp_path):
        """The plan is an artifact on the page, and the end says what was stored."""
        state = await self.run_and_answer(account, rows(2), str(tmp_path), "approved", None)
        assert (await state.aresult()).stored == 2
        assert state.message == "2 of 2 stored, $0.06"
        assert sandbox.service.bill()["accepted"] == 2
        async with get_client() as client:
            key = build_artifact_key(f"file://{tmp_path}", "plan")
            found = await client.read_artifacts(
                artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key]))
            )
        assert "# Resume to pay $0.06 for 2 images; cancel to decline" in found[0].data
        assert "2  to be paid" in found[0].data

    @pytest.mark.parametrize("answer", [Cancelling(), Cancelled()])
    async def test_cancelling_declines(self, answer, account, sandbox, tmp_path, caplog):
        name = f"declined-{answer.name}"
        state = await self.run_and_answer(account, rows(2), str(tmp_path), name, answer)
        assert state.is_cancelled()
        assert sandbox.service.bill()["accepted"] == 0
        assert "Traceback" not in caplog.text

    @pytest.mark.parametrize(("answer", "stored"), [(None, 7), (Cancelling(), 2)])
    async def test_pilot_shows_its_images_beside_the_price_of_the_rest(
        self, answer, stored, account, sandbox, tmp_path
    ):
        name = f"pilot-{stored}"
        options = {"pilot": 2, "approve_above_usd": None}
        state = await self.run_and_answer(account, rows(7), str(tmp_path), name, answer, **options)
        assert sandbox.service.bill()["accepted"] == stored
        if answer is None:
            summary = await state.aresult()
            assert (summary.stored, summary.already_stored) == (7, 2)
        else:
            assert state.message == "The plan was declined, so nothing more was submitted."
        async with get_client() as client:
            key = build_artifact_key(f"file://{tmp_path}", "plan")
            found = await client.read_artifacts(
                artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key]))
            )
        assert "# Resume to pay $0.15 for 5 images; cancel to decline" in found[0].data
        assert "![pilot](data:image/webp;base64," in found[0].data

    async def test_changed_manifest_needs_a_new_approval(self, account, sandbox, tmp_path):
        path = tmp_path / "m.csv"
        path.write_text("id,prompt\n0,a lighthouse 0\n1,a lighthouse 1\n")

        def grow():
            path.write_text(path.read_text() + "2,a third\n")

        state = await self.run_and_answer(
            account, str(path), str(tmp_path / "out"), "changed", None, meanwhile=grow
        )
        with pytest.raises(BatchStoppedError, match="has changed since it was approved"):
            await state.aresult()
        assert sandbox.service.bill()["accepted"] == 0
