"""A budget is never exceeded: not by POSTs in flight, unknown rows or a resume."""

import asyncio

import pytest

from prefect_flux_kontext.batch.budget import Budget, open_budget
from prefect_flux_kontext.batch.index import LedgerIndex
from prefect_flux_kontext.batch.policy import RowOptions
from prefect_flux_kontext.batch.status import read_ledger_status
from prefect_flux_kontext.errors import (
    BatchStoppedError,
    BudgetReachedError,
    ConfigurationError,
    FluxKontextError,
)
from prefect_flux_kontext.ledger.heartbeat import Heartbeat, keep_heartbeat
from prefect_flux_kontext.ledger.ledger import Ledger
from prefect_flux_kontext.ledger.records import GIVEN_UP
from prefect_flux_kontext.ledger.store import RecordStore
from prefect_flux_kontext.ledger.waves import OpenWave, close_wave, open_wave
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


async def test_budget_ends_the_batch_and_paid_rows_are_stored(sandbox, tmp_path):
    with pytest.raises(BudgetReachedError, match=r"budget of \$0\.31 .* 10 of"):
        await run(sandbox, rows(40), tmp_path, budget_usd=0.31)
    assert sandbox.service.bill()["accepted"] == 10
    assert len(list(tmp_path.glob("*.jpg"))) == 10


async def test_budget_holds_across_resumes(sandbox, tmp_path):
    assert (await run(sandbox, rows(4), tmp_path)).stored == 4
    for _ in range(2):
        with pytest.raises(BudgetReachedError):
            await run(sandbox, rows(20), tmp_path, budget_usd=0.21)
        assert sandbox.service.bill()["accepted"] == 7
    assert (await run(sandbox, rows(20), tmp_path, budget_usd=0.60)).stored == 20


async def test_budget_that_is_just_enough_is_enough(sandbox, tmp_path):
    assert (await run(sandbox, rows(11), tmp_path, budget_usd=0.33)).stored == 11


async def test_budget_reserves_the_dearest_route(sandbox, tmp_path, monkeypatch):
    monkeypatch.setenv("FLUX_KONTEXT_PRICE_PRO_OFFICIAL", "0.05")
    with pytest.raises(BudgetReachedError, match=r"the next image costs \$0\.05"):
        await run(sandbox, rows(9), tmp_path, budget_usd=0.31)
    assert sandbox.service.bill()["accepted"] == 6


async def test_budget_counts_failed_generations(sandbox, tmp_path):
    with pytest.raises(BudgetReachedError):
        await run(sandbox, rows(9, prompt="nsfw"), tmp_path, budget_usd=0.15)
    assert sandbox.service.bill()["accepted"] == 5


async def test_budget_counts_unknown_rows(tmp_path):
    """Also rows that were given up and submitted again."""
    store = RecordStore(str(tmp_path))
    ledger = Ledger(store, "gone", PRICES)
    entries = []
    for number in range(3):
        row = make_row(number, {"prompt": f"x {number}"})
        entries.append(await ledger.claim(row, await ledger.read(row.key)))
    given_up = FluxKontextError("as a person says", code=GIVEN_UP)
    await ledger.record_rejected(entries[0], given_up, by="person")
    await ledger.record_rejected(entries[1], FluxKontextError("no", code=400))
    keys = [entry.key for entry in entries]
    await open_wave(store, OpenWave(name="gone-1", owner="gone", keys=keys))
    budget = await open_budget(store, Heartbeat("me"), RowOptions(cadence=QUICK, budget_usd=0.10))
    await budget.reserve(0.03, {})
    with pytest.raises(BudgetReachedError, match=r"\$0\.01 is left"):
        await asyncio.gather(budget.settle(0.03, {}, refunded=False), budget.reserve(0.03, {}))


async def test_budget_allows_one_run_an_output(tmp_path):
    store = RecordStore(str(tmp_path))
    options = RowOptions(cadence=QUICK, budget_usd=1.0)
    async with keep_heartbeat(store) as one, keep_heartbeat(store) as two:
        for owner in (one, two):
            with pytest.raises(ConfigurationError, match="Another run is paying"):
                await open_budget(store, owner, options)
    async with keep_heartbeat(store) as alone:
        await open_budget(store, alone, options)


async def test_reserve_waits_for_posts_in_flight():
    budget = Budget(0.06)
    await budget.reserve(0.03, {})
    await budget.reserve(0.03, {})
    third = asyncio.create_task(budget.reserve(0.03, {}))
    await asyncio.sleep(0)
    assert not third.done()
    await budget.settle(0.03, {}, refunded=True)
    await third
    fourth = asyncio.create_task(budget.reserve(0.03, {}))
    await asyncio.sleep(0)
    await budget.settle(0.03, {}, refunded=False)
    assert not fourth.done()
    await budget.settle(0.03, {}, refunded=False)
    with pytest.raises(BudgetReachedError):
        await fourth


async def test_budget_has_no_rounding_error():
    budget = Budget(10.0)
    for _ in range(1_000):
        await budget.reserve(0.01, {})
        await budget.settle(0.01, {}, refunded=False)
    with pytest.raises(BudgetReachedError):
        await budget.reserve(0.01, {})


async def test_no_budget_means_no_cap():
    budget = Budget(None)
    await budget.reserve(1e9, {})
    await budget.settle(1e9, {}, refunded=False)


PAID_FAILURE = ["accepted", "failed"]
GIVEN_UP_SUBMIT = ["given up"]


@pytest.mark.parametrize(
    ("history", "spent", "doubtful"),
    [
        ([["accepted"]], 0.03, 0.0),
        ([["unknown"]], 0.0, 0.03),
        ([["rejected"]], 0.0, 0.0),
        ([PAID_FAILURE, ["rejected"]], 0.03, 0.0),
        ([PAID_FAILURE, ["unknown"]], 0.03, 0.03),
        ([PAID_FAILURE, PAID_FAILURE, ["rejected"], ["rejected"]], 0.06, 0.0),
        ([GIVEN_UP_SUBMIT, ["rejected"]], 0.0, 0.03),
        ([GIVEN_UP_SUBMIT, ["accepted", "stored"]], 0.03, 0.03),
        ([GIVEN_UP_SUBMIT, PAID_FAILURE, ["rejected"]], 0.03, 0.03),
    ],
    ids=str,
)
@pytest.mark.parametrize("closed_after", ["each attempt", "the last attempt", "never"])
async def test_money_of_every_attempt_is_counted(tmp_path, history, spent, doubtful, closed_after):
    """Status, plan and budget agree, wherever the row's records end up."""
    store = RecordStore(str(tmp_path))
    ledger = Ledger(store, "gone", PRICES)
    row = make_row(1, {"prompt": "x"})
    for number, steps in enumerate(history, start=1):
        wave = OpenWave(name=f"gone-{number}", owner="gone", keys=[row.key])
        await open_wave(store, wave)
        entry = await ledger.claim(row, await ledger.read(row.key))
        for step in steps:
            entry = await take_step(ledger, entry, step)
        if closed_after == "each attempt" or (
            closed_after == "the last attempt" and number == len(history)
        ):
            await close_wave(store, wave, [entry])
    status = await read_ledger_status(store)
    assert (status.spent, status.doubtful) == pytest.approx((spent, doubtful))
    with LedgerIndex() as index:
        await index.read(store)
        assert sum(index.sum_money()) == pytest.approx(spent + doubtful)


async def take_step(ledger, entry, step):
    match step:
        case "accepted":
            return await ledger.record_accepted(entry, f"task_{entry.attempt}")
        case "rejected":
            return await ledger.record_rejected(entry, FluxKontextError("no", code=403))
        case "given up":
            return await ledger.record_rejected(entry, FluxKontextError("no", code=GIVEN_UP))
        case "failed":
            return await ledger.record_failed(entry, FluxKontextError("no", code="FAILED"))
        case "stored":
            return await ledger.record_stored(entry, ["x.jpg"], [])
    return entry


async def test_frozen_run_may_not_spend_from_its_budget():
    heartbeat = Heartbeat("me", beat_seconds=0.0)
    with pytest.raises(BatchStoppedError, match="frozen"):
        Budget(1.0, heartbeat=heartbeat).check_current()
    Budget(1.0, heartbeat=Heartbeat("me")).check_current()
    Budget(None, heartbeat=heartbeat).check_current()
