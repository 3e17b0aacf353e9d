"""The flows with retries, as subflows, and without a deployment."""

import pytest
from prefect import flow

from prefect_flux_kontext import flows
from prefect_flux_kontext.batch.waves import Wave
from prefect_flux_kontext.errors import ConfigurationError
from prefect_flux_kontext.flows import collect_batch, style_transfer_batch
from prefect_flux_kontext.orchestration.batch_run import run_wave
from tests.orchestration.conftest import QUICK

pytestmark = pytest.mark.anyio


def rows(number):
    return [{"id": f"row-{n}", "prompt": f"a lighthouse {n}"} for n in range(number)]


@pytest.fixture
def fails_once(monkeypatch):
    """The first wave runs and then fails, as with a temporary error of the worker."""
    calls = []
    run = Wave.run

    async def run_and_fail(wave):
        summary = await run(wave)
        calls.append(wave)
        if len(calls) == 1:
            raise ConnectionError("a temporary error")
        return summary

    monkeypatch.setattr(Wave, "run", run_and_fail)
    return calls


async def test_retried_flow_pays_nothing_twice(fails_once, account, sandbox, tmp_path):
    retried = style_transfer_batch.with_options(retries=1, retry_delay_seconds=0)
    summary = await retried(rows(20), str(tmp_path), credentials=account, cadence=QUICK)
    assert len(fails_once) == 1  # nothing was left for another wave
    assert (summary.stored, summary.already_stored) == (20, 20)
    assert sandbox.service.bill()["accepted"] == 20


async def test_retried_wave_pays_nothing_twice(
    fails_once, account, sandbox, tmp_path, monkeypatch
):
    monkeypatch.setattr(flows, "run_wave", run_wave.with_options(retries=2))
    summary = await style_transfer_batch(
        rows(20), str(tmp_path), credentials=account, cadence=QUICK
    )
    assert len(fails_once) == 2
    assert (summary.rows, summary.stored) == (20, 20)
    assert sandbox.service.bill()["accepted"] == 20
    again = await style_transfer_batch(rows(20), str(tmp_path), credentials=account, cadence=QUICK)
    assert again.already_stored == 20
    assert sandbox.service.bill()["accepted"] == 20


async def test_batch_runs_as_a_subflow(account, sandbox, tmp_path):
    @flow
    async def own_flow():
        return await style_transfer_batch(
            rows(2), str(tmp_path), credentials=account, cadence=QUICK
        )

    assert (await own_flow()).stored == 2


async def test_results_are_collected_by_another_flow_run(account, sandbox, tmp_path):
    how = {"credentials": account, "cadence": QUICK}
    left = await style_transfer_batch(rows(5), str(tmp_path), wait="collect", **how)
    assert (left.rows, left.outstanding, left.stored) == (5, 5, 0)
    assert sandbox.service.bill()["accepted"] == 5
    collected = await collect_batch(str(tmp_path), **how)
    assert (collected.stored, collected.spent) == (5, 0)
    assert sandbox.service.bill()["accepted"] == 5


async def test_suspending_without_a_deployment_is_refused_unpaid(account, sandbox, tmp_path):
    with pytest.raises(ConfigurationError, match="no deployment") as caught:
        await style_transfer_batch(rows(2), str(tmp_path), credentials=account, wait="suspend")
    assert "collect_batch" in caught.value.message
    assert sandbox.service.bill()["accepted"] == 0


async def test_suspending_a_subflow_is_refused_unpaid(account, sandbox, tmp_path):
    @flow
    async def own_flow():
        return await style_transfer_batch(
            rows(2), str(tmp_path), credentials=account, wait="suspend"
        )

    with pytest.raises(ConfigurationError, match="Nothing was submitted"):
        await own_flow()
    assert sandbox.service.bill()["accepted"] == 0
