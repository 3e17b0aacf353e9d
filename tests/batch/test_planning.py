"""The plan says what a run would do and pay."""

import asyncio

import pytest

from prefect_flux_kontext.batch.index import PlannedAction
from prefect_flux_kontext.batch.planning import Plan
from prefect_flux_kontext.errors import FluxKontextError, ManifestError
from prefect_flux_kontext.ledger.heartbeat import keep_heartbeat
from prefect_flux_kontext.ledger.ledger import Ledger
from prefect_flux_kontext.ledger.store import RecordStore, open_ledger_store
from prefect_flux_kontext.ledger.waves import OpenWave, open_wave
from prefect_flux_kontext.manifest.reader import Manifest
from prefect_flux_kontext.manifest.row import RefusedRow, make_row
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from prefect_flux_kontext.storage.filesystem import OutputFolder
from tests.support.batches import KEY, run
from tests.support.plans import PRICES, build_plan


def manifest(*prompts, mode="pro"):
    return Manifest([{"id": n, "prompt": p, "mode": mode} for n, p in enumerate(prompts)])


def test_plan_counts_equal_rows_once_and_prices_by_mode():
    plan = build_plan(
        Manifest(
            [
                {"prompt": "a"},
                {"prompt": "b", "mode": "max"},
                {"id": "twin", "prompt": "a"},
                {"id": "wrong"},
            ]
        )
    )
    assert (plan.rows, plan.refused, plan.duplicates, plan.to_pay) == (4, 1, 1, 2)
    assert plan.price == pytest.approx(0.09)
    text = str(plan)
    for word in ("4  rows", "1  invalid", "1  equal", "2  to be paid", "$0.09  price"):
        assert word in text


def test_plan_estimates_time_by_the_accounts_limits():
    plan = build_plan(manifest(*map(str, range(1_000))))
    # 1,000 tasks of 30 s are 33.3 a second; at six requests each, 10,000 a minute are 27.8.
    assert plan.seconds == pytest.approx(1_000 / (10_000 / 60 / 6) + 30)
    assert build_plan(Manifest([{"id": "x", "prompt": "y"}])).seconds == pytest.approx(30, abs=1)


def test_plan_reports_every_refused_row():
    plan = build_plan(manifest("x", "", "y", ""))
    assert [row.line for row in plan.problems] == [2, 4]
    with pytest.raises(ManifestError, match=r"2 of 4 rows .*\n  2 rows \(lines 2, 4\): prompt is"):
        plan.check(skip_invalid=False)
    plan.check(skip_invalid=True)


def test_check_shortens_a_long_list_of_refused_rows():
    refused = [RefusedRow(str(n), n, f"reason {n}") for n in range(30)]
    plan = Plan(url="m.csv", rows=30, refused=30, problems=refused)
    with pytest.raises(ManifestError, match=r"… and 10 more problems\nFix them\.$"):
        plan.check(skip_invalid=True)


@pytest.mark.parametrize(
    ("prices", "price", "line"),
    [
        ({}, "0.09", "1 in max (official) at $0.06, 1 in pro (value) at $0.03"),
        ({"max official": 0.1}, "0.13", "1 in max (official) at $0.1, 1 in pro (value) at $0.03"),
    ],
)
def test_plan_prices_by_mode_and_provider(prices, price, line):
    rows = [
        {"prompt": "a", "provider": "value"},
        {"prompt": "b", "provider": "official", "mode": "max"},
    ]
    text = str(build_plan(Manifest(rows), prices={**PRICES, **prices}))
    assert f"${price}  price: {line}" in text
    unset = "more if `auto` takes the official route; its price: FLUX_KONTEXT_PRICE_MAX_OFFICIAL"
    assert (unset in text) == (not prices)


def test_plan_of_auto_counts_the_dearest_route():
    plan = build_plan(manifest("a", "b"), prices={**PRICES, "pro official": 0.05})
    assert "$0.10  price: 2 in pro at $0.05\n" in str(plan)
    assert "official" not in str(plan)
    assert "FLUX_KONTEXT_PRICE_PRO_OFFICIAL" in str(build_plan(manifest("a")))


def test_digest_depends_on_rows_and_prices():
    digest = build_plan(manifest("a", "b")).digest
    assert build_plan(manifest("a", "b")).digest == digest
    for other in (manifest("a"), manifest("a", "c"), manifest("a", "b", mode="max")):
        assert build_plan(other).digest != digest


def test_plan_of_a_finished_batch_has_nothing_to_pay(tmp_path):
    rows = manifest("a", "b", "nsfw")
    with running_sandbox(SandboxSettings(mean=0.05, long_edge=16, api_key=KEY)) as sandbox:
        asyncio.run(run(sandbox, rows, tmp_path))
    store = open_ledger_store(OutputFolder(str(tmp_path)))
    plan = build_plan(manifest("a", "b", "nsfw", "new"), store, budget_usd=0.10)
    assert plan.actions == {
        PlannedAction.STORED: 2,
        PlannedAction.FAILED: 1,
        PlannedAction.PAY: 1,
    }
    assert plan.spent == pytest.approx(0.09)
    assert "$0.10  budget for all runs: not enough for all rows" in str(plan)
    # A content violation is not paid for again, even when a retry is asked for.
    assert build_plan(rows, store, retry_failed=True).to_pay == 0
    summary = plan.to_summary("out")
    assert (summary.rows, summary.stored, summary.failed, summary.not_submitted) == (4, 2, 1, 1)


def test_plan_reads_rows_of_unfinished_waves(tmp_path):
    store = RecordStore(str(tmp_path))
    prompts = ("dead", "living", "accepted", "rejected", "new")

    async def records():
        async with keep_heartbeat(store) as heartbeat:
            ledgers = {
                name: Ledger(store, heartbeat.owner if name == "living" else "gone", PRICES)
                for name in prompts
            }
            keys = []
            for name in prompts[:4]:
                row = make_row(1, {"prompt": name})
                entry = await ledgers[name].read(row.key)
                entry = await ledgers[name].claim(row, entry)
                keys.append(entry.key)
                if name == "accepted":
                    await ledgers[name].record_accepted(entry, "task_1")
                if name == "rejected":
                    await ledgers[name].record_rejected(entry, FluxKontextError("no", code=400))
            await open_wave(store, OpenWave(name="w-1", owner="gone", keys=keys))
            return await asyncio.gather(
                asyncio.to_thread(build_plan, manifest(*prompts), store),
                asyncio.to_thread(build_plan, manifest(*prompts), store, resubmit_unknown=True),
            )

    plan, resubmitting = asyncio.run(records())
    assert plan.actions == {
        PlannedAction.UNKNOWN: 1,
        PlannedAction.OUTSTANDING: 2,
        PlannedAction.PAY: 2,
    }
    assert plan.spent == pytest.approx(0.09)
    assert resubmitting.actions == {PlannedAction.OUTSTANDING: 2, PlannedAction.PAY: 3}


def test_capped_limits_the_budget_to_the_plan():
    plan = build_plan(manifest("a", "b"), budget_usd=5.0)
    options = plan_options(budget_usd=5.0)
    assert plan.with_budget_cap(options, 0.01).budget_usd == pytest.approx(0.06)
    assert plan.with_budget_cap(options, 1.0).budget_usd == pytest.approx(1.0)
    assert plan.with_budget_cap(options, 9.0).budget_usd == pytest.approx(5.0)
    assert plan.with_budget_cap(plan_options(budget_usd=0.0), 1.0).budget_usd == 0.0


def plan_options(**how):
    from prefect_flux_kontext.batch.policy import RowOptions  # noqa: PLC0415
    from tests.support.batches import QUICK  # noqa: PLC0415

    return RowOptions(cadence=QUICK, **how)
