"""What a batch tells of itself is so; and where it is not, the checker sees it."""

import json
from dataclasses import replace
from decimal import Decimal

import pytest

from prefect_flux_kontext.sandbox.faults.plan import FaultPlan
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from tests.chaos.checker import Findings
from tests.chaos.processes import Batch, Ended
from tests.chaos.told import (
    check_status,
    check_summary,
    check_summary_in_bad_weather,
    summary_in,
)
from tests.chaos.trials import Line, finish


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A batch with a lost reply that was finished, and the summary and status it has told."""
    with running_sandbox(SandboxSettings(mean=0.3, long_edge=16)) as service:
        service.weather.change(FaultPlan(faults=["submit:lost-reply@4"]))
        batch = Batch(service, tmp_path_factory.mktemp("told"), FLUX_KONTEXT_GALLERY_IMAGES="0")
        batch.write([(f"row-{n}", f"lighthouse {n}") for n in range(30)])
        ended = batch.run()
        yield batch, ended, batch.command("status").said


def test_summary_status_and_exit_tell_what_is_so(told):
    batch, ended, status = told
    found = batch.check(killed=False)
    # The reply that was lost was billed, and the summary could not know it.
    check_summary(found, ended, batch.billed - Decimal("0.03"))
    check_summary_in_bad_weather(found, ended, batch.billed, 30)
    check_status(found, status)
    assert found.problems == []
    assert summary_in(ended.said).unknown == 1


@pytest.mark.parametrize(
    ("so", "not_so"),
    [("29 of 30", "28 of 30"), ("1 unknown", "2 unknown"), ("; $0", "; $1"), (" rows stored", "")],
)
def test_a_wrong_summary_is_seen(told, so, not_so):
    batch, ended, _ = told
    wrong = Ended(ended.status, ended.said.replace(so, not_so))
    assert wrong.said != ended.said
    found = batch.check(killed=False)
    check_summary(found, wrong, batch.billed - Decimal("0.03"))
    assert len(found.problems) == 1


def test_a_wrong_exit_status_is_seen(told):
    batch, ended, _ = told
    found = batch.check(killed=False)
    check_summary(found, replace(ended, status=0), batch.billed - Decimal("0.03"))
    assert "has ended with status 0" in str(found)


@pytest.mark.parametrize("billed", ["-0.03", "0.06"])
def test_in_bad_weather_too_money_that_nobody_told_of_is_seen(told, billed):
    batch, ended, _ = told
    found = Findings()
    check_summary_in_bad_weather(found, ended, summary_in(ended.said).spent + Decimal(billed), 30)
    assert "were billed meanwhile" in str(found), batch


@pytest.mark.parametrize(("so", "not_so"), [("stored", "failed"), ("$0.03", "$0.06")])
def test_a_wrong_status_is_seen(told, so, not_so):
    batch, _, status = told
    found = batch.check(killed=False)
    check_status(found, status.replace(so, not_so))
    assert len(found.problems) == 1


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        (lambda _: [], "has not, or has besides"),
        (lambda line: [line, line], "has a row twice"),
        (lambda line: [line | {"state": "failed"}], "the ledger stored"),
        (lambda line: [line | {"cost_usd": 0.06}], "prices make"),
        (lambda line: [line | {"sha256": "0" * 64}], "makes up an image"),
        (lambda line: [line | {"key": "0" * 32}], "makes up a key"),
        (lambda line: [line | {"prompt": "another"}], "differ"),
    ],
)
def test_a_wrong_result_manifest_is_seen(told, change, seen):
    batch, _, _ = told
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


def test_clocks_that_are_a_day_off_change_nothing_that_is_told(tmp_path):
    """One run's clock is a day ahead, the last run's is right, so a day behind."""
    with running_sandbox(SandboxSettings(mean=0.3, long_edge=16)) as service:
        service.weather.change(
            FaultPlan(faults=["task:lost-result=0.3", "status:skewed-clock=0.5"])
        )
        batch = Batch(
            service, tmp_path, FLUX_KONTEXT_GALLERY_IMAGES="0", FLUX_KONTEXT_POLL_TIMEOUT="10"
        )
        batch.write([(f"row-{n}", f"lighthouse {n}") for n in range(30)])
        line = Line()
        finish(line, batch, 0, clock=(3_600, 86_400))
        assert not line.broken()
        assert line.rows == batch.accepted == 30
