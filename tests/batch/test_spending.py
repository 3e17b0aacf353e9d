"""Money by the values of columns: budgets that hold for groups, and what was spent by them."""

import asyncio
import json

import pytest

from prefect_flux_kontext.batch.budget import Budget, open_budget
from prefect_flux_kontext.batch.index import LedgerIndex
from prefect_flux_kontext.batch.policy import FailurePolicy, RowOptions
from prefect_flux_kontext.batch.repair import rebuild_waves
from prefect_flux_kontext.batch.spending import Spending, describe_groups
from prefect_flux_kontext.batch.status import read_ledger_status
from prefect_flux_kontext.errors import (
    BudgetReachedError,
    ConfigurationError,
    FluxKontextError,
    GroupBudgetReachedError,
    ManifestError,
)
from prefect_flux_kontext.ledger.heartbeat import Heartbeat
from prefect_flux_kontext.ledger.ledger import Ledger
from prefect_flux_kontext.ledger.store import RecordStore, open_ledger_store
from prefect_flux_kontext.ledger.waves import OpenWave, open_wave
from prefect_flux_kontext.manifest.reader import Manifest
from prefect_flux_kontext.manifest.row import make_row
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from prefect_flux_kontext.storage.filesystem import OutputFolder
from tests.support.batches import KEY, QUICK, run
from tests.support.plans import PRICES, build_plan

pytestmark = pytest.mark.anyio


@pytest.fixture
def sandbox():
    with running_sandbox(SandboxSettings(mean=0.05, long_edge=16, api_key=KEY)) as running:
        yield running


def rows(*teams, prompt="a lighthouse"):
    """One row for each team, with different prompts."""
    return Manifest(
        [{"id": n, "prompt": f"{prompt} {n}", "team": team} for n, team in enumerate(teams)]
    )


def amounts(groups, column="team"):
    return {group.columns[column]: group.spent for group in groups}


async def status_of(folder, by=("team",)):
    output = OutputFolder(str(folder))
    status = await read_ledger_status(open_ledger_store(output), output, by)
    return amounts(status.spending.list_groups(), by[0])


BLUE = {"team": {"blue": 0.07}}
AGAIN = FailurePolicy(retry={"CONTENT_VIOLATION": 1}, never=[])


async def test_group_budget_stops_its_rows_only(sandbox, tmp_path, caplog):
    manifest = rows(*["blue", "red", ""] * 5)
    summary = await run(sandbox, manifest, tmp_path, budget_by=BLUE)
    assert (summary.stored, summary.not_submitted) == (12, 3)
    assert amounts(summary.spent_by) == pytest.approx({"blue": 0.06, "red": 0.15, "other": 0.15})
    assert sandbox.service.bill()["accepted"] == 12
    warnings = [text for text in caplog.messages if "The budget of $0.07 for team=blue" in text]
    assert len(warnings) == 1


async def test_group_budget_holds_across_runs(sandbox, tmp_path):
    for _ in range(2):
        await run(sandbox, rows(*["blue"] * 5), tmp_path, budget_by=BLUE)
        assert sandbox.service.bill()["accepted"] == 2
    summary = await run(sandbox, rows(*["blue"] * 5), tmp_path, budget_by={"team": {"blue": 0.15}})
    assert summary.stored == 5


async def test_group_budget_counts_failed_rows(sandbox, tmp_path):
    manifest = rows(*["blue"] * 5, prompt="nsfw")
    summary = await run(sandbox, manifest, tmp_path, budget_by=BLUE)
    assert (summary.failed, summary.not_submitted) == (2, 3)


async def test_group_budget_counts_doubtful_money(tmp_path):
    """Unknown rows, and rows given up, whose intents name the group."""
    store = RecordStore(str(tmp_path))
    ledger = Ledger(store, "gone", PRICES)
    keys = []
    for number, team in enumerate(["blue", "blue", "red"]):
        row = make_row(number, {"prompt": f"x {number}"})
        await ledger.claim(row, await ledger.read(row.key), {"team": team})
        keys.append(row.key)
    await open_wave(store, OpenWave(name="gone-1", owner="gone", keys=keys))
    options = RowOptions(cadence=QUICK, budget_by={"team": {"blue": 0.08, "red": 0.08}})
    budget = await open_budget(store, Heartbeat("me"), options)
    with pytest.raises(GroupBudgetReachedError, match=r"team=blue .* \$0\.02 is left"):
        await budget.reserve(0.03, {"team": "blue"})
    await budget.reserve(0.03, {"team": "red"})


async def test_both_budgets_hold_together(sandbox, tmp_path):
    with pytest.raises(BudgetReachedError, match="for this output"):
        await run(sandbox, rows(*["red", "blue"] * 9), tmp_path, budget_usd=0.2, budget_by=BLUE)
    assert sandbox.service.bill()["accepted"] == 6
    assert (await status_of(tmp_path))["blue"] == pytest.approx(0.06)


async def test_several_columns_have_budgets(sandbox, tmp_path):
    manifest = Manifest(
        [
            {"id": n, "prompt": f"cat {n}", "team": team, "mode": mode}
            for n, (team, mode) in enumerate([("blue", "pro"), ("red", "max"), ("blue", "max")])
        ]
    )
    budgets = {"mode": {"max": 0.06}, "team": {"blue": 0.05}}
    summary = await run(sandbox, manifest, tmp_path, budget_by=budgets)
    assert (summary.stored, summary.not_submitted) == (2, 1)
    assert summary.spent == pytest.approx(0.09)


async def test_waiting_row_gets_what_another_returns():
    budget = Budget(None, by={"team": {"blue": 0.03}})
    await budget.reserve(0.03, {"team": "blue"})
    second = asyncio.create_task(budget.reserve(0.03, {"team": "blue"}))
    await budget.reserve(0.03, {"team": "red"})
    await asyncio.sleep(0)
    assert not second.done()
    await budget.settle(0.03, {"team": "blue"}, refunded=True)
    await second


async def test_row_of_a_spent_group_does_not_wait_for_others():
    budget = Budget(1.0, by={"team": {"blue": 0.0}})
    await budget.reserve(0.03, {"team": "red"})
    with pytest.raises(GroupBudgetReachedError):
        await budget.reserve(0.03, {"team": "blue"})


async def test_of_equal_rows_the_first_pays(sandbox, tmp_path):
    manifest = Manifest(
        [{"id": team, "prompt": "a cat", "team": team} for team in ("blue", "red")]
    )
    summary = await run(sandbox, manifest, tmp_path, spend_by=["team"])
    assert summary.stored == 2
    assert amounts(summary.spent_by) == {"blue": 0.03} == await status_of(tmp_path)


async def test_retry_is_counted_where_the_first_attempt_was(tmp_path, sandbox):
    await run(sandbox, rows("blue", prompt="nsfw"), tmp_path, spend_by=["team"])
    await run(sandbox, rows("red", prompt="nsfw"), tmp_path, spend_by=["team"], policy=AGAIN)
    assert await status_of(tmp_path) == pytest.approx({"blue": 0.06})


async def test_failed_row_over_the_budget_stays_in_failed_csv(sandbox, tmp_path):
    """Otherwise a retry with a budget would forget the rows that it did not submit."""
    assert (await run(sandbox, rows("blue", "blue", prompt="nsfw"), tmp_path)).failed == 2
    manifest = rows("blue", "blue", prompt="kind")
    summary = await run(sandbox, manifest, tmp_path, budget_by={"team": {"blue": 0.0}})
    assert summary.not_submitted == 2
    assert len((tmp_path / "failed.csv").read_text().splitlines()) == 3


async def test_status_groups_runs_that_recorded_nothing(sandbox, tmp_path):
    """Their values come from the result manifest; what has none counts as `other`."""
    await run(sandbox, rows("blue", "red", ""), tmp_path)
    assert await status_of(tmp_path) == pytest.approx({"blue": 0.03, "red": 0.03, "other": 0.03})
    assert await status_of(tmp_path, ("mode",)) == pytest.approx({"pro": 0.09})
    assert await status_of(tmp_path, ("style",)) == pytest.approx({"other": 0.09})
    (tmp_path / "results.jsonl").unlink()
    with pytest.raises(ConfigurationError, match=r"No row of .* has a value in team"):
        await status_of(tmp_path)


async def test_status_groups_by_recorded_values_alone(sandbox, tmp_path):
    await run(sandbox, rows("blue", "red"), tmp_path, spend_by=["team"])
    (tmp_path / "results.jsonl").unlink()
    assert await status_of(tmp_path) == pytest.approx({"blue": 0.03, "red": 0.03})
    await rebuild_waves(RecordStore(str(tmp_path / "_ledger")))
    assert await status_of(tmp_path) == pytest.approx({"blue": 0.03, "red": 0.03})


async def test_status_groups_columns_with_names_of_results(sandbox, tmp_path):
    manifest = Manifest([{"id": "a", "prompt": "cat", "state": "Ohio", "Source": "web"}])
    await run(sandbox, manifest, tmp_path)
    assert await status_of(tmp_path, ("state",)) == {"Ohio": 0.03}
    assert await status_of(tmp_path, ("Source",)) == {"web": 0.03}


async def test_recorded_values_hold_no_signatures(sandbox, tmp_path):
    page = "https://cdn.example.com/a.html?X-Amz-Signature=feedbeef"
    await run(sandbox, rows(page), tmp_path, spend_by=["team"])
    records = "".join(path.read_text() for path in tmp_path.glob("_ledger/**/*.json*"))
    assert "cdn.example.com" in records
    assert "feedbeef" not in records


async def test_records_of_other_runs_have_no_columns(sandbox, tmp_path):
    await run(sandbox, rows("blue"), tmp_path)
    intents = [path.read_text() for path in tmp_path.glob("_ledger/rows/*/*.intent.json")]
    assert ["columns" in json.loads(text) for text in intents] == [False]


async def test_status_budget_and_plan_agree(sandbox, tmp_path):
    manifest = rows("blue", "red", "blue")
    await run(sandbox, manifest, tmp_path, spend_by=["team"])
    store = open_ledger_store(OutputFolder(str(tmp_path)))
    with LedgerIndex() as index:
        await index.read(store)
        spending = index.sum_by(["team"])
    assert spending.sum_dollars("team", "blue") == pytest.approx(0.06)
    assert (await status_of(tmp_path))["blue"] == pytest.approx(0.06)


async def test_balance_falls_by_what_was_spent(sandbox, tmp_path):
    summary = await run(sandbox, rows("blue", "red"), tmp_path)
    assert summary.balance_before - summary.balance_after == pytest.approx(summary.spent)
    assert "$0.06 spent; the balance fell by $0.06 to $" in str(summary)
    again = await run(sandbox, rows("blue", "red"), tmp_path)
    assert f"before this run; the balance is ${summary.balance_after:,.2f}; " in str(again)


def test_many_groups_are_summed():
    spending = Spending(["id"])
    for number in range(1_000):
        spending.add({"id": str(number)}, 0.03)
    groups = spending.list_groups()
    assert len(groups) == 101
    assert groups[-1].columns == {"id": "… 900 more"}
    assert sum(group.spent for group in groups) == pytest.approx(30)
    assert sum(group.rows for group in groups) == 1_000
    assert describe_groups(groups)[-1].startswith("   $29.40  id=… 81 more: 980 rows")


@pytest.mark.parametrize("options", [{"budget_by": {"tema": {"blue": 1}}}, {"spend_by": ["tema"]}])
def test_column_that_no_row_has_is_refused(options):
    with pytest.raises(ManifestError, match="No row of <rows> has a column tema"):
        build_plan(rows("blue"), **options)


def test_plan_shows_budgets_and_balance():
    plan = build_plan(rows("blue", "blue", "red"), budget_by={"team": {"blue": 0.05, "green": 1}})
    plan.balance = 0.08
    text = str(plan)
    assert "$0.05  budget for team=blue: $0.00 spent, $0.06 to be paid, not enough" in text
    assert "$1.00  budget for team=green: $0.00 spent, $0.00 to be paid\n" in text
    assert "$0.08  balance of the account: not enough for all rows" in text
    plan.balance = 0.09
    assert str(plan).endswith("$0.09  balance of the account")


async def test_row_that_cost_nothing_may_change_its_group(sandbox, tmp_path):
    (row,) = rows("red").rows()
    ledger = Ledger(open_ledger_store(OutputFolder(str(tmp_path))), "gone", PRICES)
    entry = await ledger.claim(row, await ledger.read(row.key), {"team": "blue"})
    await ledger.record_rejected(entry, FluxKontextError("no", code=400))
    await run(sandbox, rows("red"), tmp_path, spend_by=["team"])
    assert await status_of(tmp_path) == {"red": 0.03}
