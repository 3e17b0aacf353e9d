"""A batch's reports are right, and the checks find every wrong one."""

import json
from dataclasses import replace
from decimal import Decimal

import pytest

from prefect_flux_kontext.sandbox.faults.plan import FaultPlan
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from tests.chaos.checker import Findings
from tests.chaos.processes import Batch, Ended
from tests.chaos.report_checks import (
    check_status,
    check_summary,
    check_summary_under_faults,
    parse_summary,
)
from tests.chaos.trials import Totals, finish


@pytest.fixture(scope="module")
def reported_batch(tmp_path_factory):
    """A finished batch with a lost reply, its run, and the output of `status`."""
    with running_sandbox(SandboxSettings(mean=0.3, long_edge=16)) as service:
        service.active_faults.change(FaultPlan(faults=["submit:lost-reply@4"]))
        batch = Batch(
            service, tmp_path_factory.mktemp("reported"), FLUX_KONTEXT_GALLERY_IMAGES="0"
        )
        batch.write([(f"row-{n}", f"lighthouse {n}") for n in range(30)])
        ended = batch.run()
        yield batch, ended, batch.command("status").said


def test_summary_status_and_exit_code_are_right(reported_batch):
    batch, ended, status = reported_batch
    found = batch.check(killed=False)
    # The row of the lost reply was billed, which the summary cannot know.
    check_summary(found, ended, batch.billed - Decimal("0.03"))
    check_summary_under_faults(found, ended, batch.billed, 30)
    check_status(found, status)
    assert found.problems == []
    assert parse_summary(ended.said).unknown == 1


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("29 of 30", "28 of 30"), ("1 unknown", "2 unknown"), ("; $0", "; $1"), (" rows stored", "")],
)
def test_a_wrong_summary_is_found(reported_batch, right, wrong):
    batch, ended, _ = reported_batch
    wrong_run = Ended(ended.status, ended.said.replace(right, wrong))
    assert wrong_run.said != ended.said
    found = batch.check(killed=False)
    check_summary(found, wrong_run, batch.billed - Decimal("0.03"))
    assert len(found.problems) == 1


def test_a_wrong_exit_status_is_found(reported_batch):
    batch, ended, _ = reported_batch
    found = batch.check(killed=False)
    check_summary(found, replace(ended, status=0), batch.billed - Decimal("0.03"))
    assert "ended with status 0" in str(found)


@pytest.mark.parametrize("billed", ["-0.03", "0.06"])
def test_unreported_money_is_found_under_faults_too(reported_batch, billed):
    batch, ended, _ = reported_batch
    found = Findings()
    check_summary_under_faults(found, ended, parse_summary(ended.said).spent + Decimal(billed), 30)
    assert "were billed meanwhile" in str(found), batch


@pytest.mark.parametrize(("right", "wrong"), [("stored", "failed"), ("$0.03", "$0.06")])
def test_a_wrong_status_is_found(reported_batch, right, wrong):
    batch, _, status = reported_batch
    found = batch.check(killed=False)
    check_status(found, status.replace(right, wrong))
    assert len(found.problems) == 1


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        (lambda _: [], "misses, or has in addition"),
        (lambda line: [line, line], "has a row twice"),
        (lambda line: [line | {"state": "failed"}], "the ledger stored"),
        (lambda line: [line | {"cost_usd": 0.06}], "prices sum to"),
        (lambda line: [line | {"sha256": "0" * 64}], "invents an image"),
        (lambda line: [line | {"key": "0" * 32}], "invents a key"),
        (lambda line: [line | {"prompt": "another"}], "differ"),
    ],
)
def test_a_wrong_result_manifest_is_found(reported_batch, change, seen):
    batch, _, _ = reported_batch
    results = batch.folder / "out" / "results.jsonl"
    before = results.read_bytes()
    lines = list(map(json.loads, before.splitlines()))
    first = next(n for n, line in enumerate(lines) if line["state"] == "stored")
    lines[first : first + 1] = change(lines[first])
    try:
        results.write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert seen in str(batch.check(killed=False))
    finally:
        results.write_bytes(before)


def test_clocks_a_day_off_do_not_change_reports(tmp_path):
    """The clock of one run is a day ahead; that of the last run is right, so a day behind."""
    with running_sandbox(SandboxSettings(mean=0.3, long_edge=16)) as service:
        service.active_faults.change(
            FaultPlan(faults=["task:lost-result=0.3", "status:skewed-clock=0.5"])
        )
        batch = Batch(
            service, tmp_path, FLUX_KONTEXT_GALLERY_IMAGES="0", FLUX_KONTEXT_POLL_TIMEOUT="10"
        )
        batch.write([(f"row-{n}", f"lighthouse {n}") for n in range(30)])
        line = Totals()
        finish(line, batch, 0, clock=(3_600, 86_400))
        assert not line.broken()
        assert line.rows == batch.accepted == 30
