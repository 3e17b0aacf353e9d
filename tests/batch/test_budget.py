"""A budget is never passed: not by what is in flight, not by what is unknown, not by a resume."""

import asyncio

import pytest

from prefect_flux_kontext.batch.budget import Budget, open_budget
from prefect_flux_kontext.batch.policy import RowOptions
from prefect_flux_kontext.errors import BudgetReachedError, ConfigurationError, FluxKontextError
from prefect_flux_kontext.ledger.heartbeat import keep_heartbeat
from prefect_flux_kontext.ledger.ledger import Ledger
from prefect_flux_kontext.ledger.records import GIVEN_UP
from prefect_flux_kontext.ledger.store import RecordStore
from prefect_flux_kontext.ledger.waves import OpenWave, open_wave
from prefect_flux_kontext.manifest.reader import Manifest
from prefect_flux_kontext.manifest.row import make_row
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from tests.support.batches import KEY, QUICK, run
from tests.support.plans import PRICES

pytestmark = pytest.mark.anyio


@pytest.fixture
def sandbox():
    with running_sandbox(SandboxSettings(mean=0.05, long_edge=16, api_key=KEY)) as running:
        yield running


def rows(number, start=0, prompt="a lighthouse"):
    return Manifest([{"id": n, "prompt": f"{prompt} {n}"} for n in range(start, start + number)])


async def test_the_row_that_would_pass_it_ends_the_batch_and_the_paid_rows_are_stored(
    sandbox, tmp_path
):
    with pytest.raises(BudgetReachedError, match=r"budget of \$0\.31 .* 10 of"):
        await run(sandbox, rows(40), tmp_path, budget_usd=0.31)
    assert sandbox.service.bill()["accepted"] == 10
    assert len(list(tmp_path.glob("*.jpg"))) == 10


async def test_it_holds_across_resumes_for_the_output_counts_what_it_has_cost(sandbox, tmp_path):
    assert (await run(sandbox, rows(4), tmp_path)).stored == 4
    for _ in range(2):
        with pytest.raises(BudgetReachedError):
            await run(sandbox, rows(20), tmp_path, budget_usd=0.21)
        assert sandbox.service.bill()["accepted"] == 7
    assert (await run(sandbox, rows(20), tmp_path, budget_usd=0.60)).stored == 20


async def test_a_budget_that_is_just_enough_is_enough(sandbox, tmp_path):
    assert (await run(sandbox, rows(11), tmp_path, budget_usd=0.33)).stored == 11


async def test_failed_generations_count_for_they_are_paid(sandbox, tmp_path):
    with pytest.raises(BudgetReachedError):
        await run(sandbox, rows(9, prompt="nsfw"), tmp_path, budget_usd=0.15)
    assert sandbox.service.bill()["accepted"] == 5


async def test_rows_that_may_be_paid_for_count(tmp_path):
    """Also those that were given up and submitted again."""
    store = RecordStore(str(tmp_path))
    ledger = Ledger(store, "gone", PRICES)
    entries = []
    for number in range(3):
        row = make_row(number, {"prompt": f"x {number}"})
        entries.append(await ledger.claim(row, await ledger.read(row.key)))
    given_up = FluxKontextError("as a person says", code=GIVEN_UP)
    await ledger.rejected(entries[0], given_up, by="person")
    await ledger.rejected(entries[1], FluxKontextError("no", code=400))
    keys = [entry.key for entry in entries]
    await open_wave(store, OpenWave(name="gone-1", owner="gone", keys=keys))
    budget = await open_budget(store, "me", RowOptions(cadence=QUICK, budget_usd=0.10))
    await budget.reserve(0.03)
    with pytest.raises(BudgetReachedError, match=r"\$0\.01 is left"):
        await asyncio.gather(budget.settle(0.03, refunded=False), budget.reserve(0.03))


async def test_two_runs_with_a_budget_never_pay_into_one_output_at_once(tmp_path):
    store = RecordStore(str(tmp_path))
    options = RowOptions(cadence=QUICK, budget_usd=1.0)
    async with keep_heartbeat(store) as one, keep_heartbeat(store) as two:
        for owner in (one, two):
            with pytest.raises(ConfigurationError, match="Another run is paying"):
                await open_budget(store, owner, options)
    async with keep_heartbeat(store) as alone:
        await open_budget(store, alone, options)


async def test_what_is_in_flight_is_counted_until_it_is_known_not_to_be_owed():
    budget = Budget(0.06)
    await budget.reserve(0.03)
    await budget.reserve(0.03)
    third = asyncio.create_task(budget.reserve(0.03))
    await asyncio.sleep(0)
    assert not third.done()
    await budget.settle(0.03, refunded=True)
    await third
    fourth = asyncio.create_task(budget.reserve(0.03))
    await asyncio.sleep(0)
    await budget.settle(0.03, refunded=False)
    assert not fourth.done()
    await budget.settle(0.03, refunded=False)
    with pytest.raises(BudgetReachedError):
        await fourth


async def test_a_thousand_cents_lose_nothing_to_rounding():
    budget = Budget(10.0)
    for _ in range(1_000):
        await budget.reserve(0.01)
        await budget.settle(0.01, refunded=False)
    with pytest.raises(BudgetReachedError):
        await budget.reserve(0.01)


async def test_no_budget_is_no_cap():
    budget = Budget(None)
    await budget.reserve(1e9)
    await budget.settle(1e9, refunded=False)
