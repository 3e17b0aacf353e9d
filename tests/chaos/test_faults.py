"""A batch under every fault: the money is right to the row and the cent."""

from decimal import Decimal

import pytest

from prefect_flux_kontext.sandbox.faults.plan import FaultPlan
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from tests.chaos.fault_sets import NOT_ACCEPTED, STOPPING, UNKNOWN_OUTCOME, plan_each_fault_once
from tests.chaos.processes import Batch
from tests.chaos.test_kills import assert_no_problems, lines

ROWS = 90
QUICK = SandboxSettings(mean=0.3, long_edge=16)


@pytest.fixture
def service():
    with running_sandbox(QUICK) as sandbox:
        yield sandbox


def run_until_done(batch, *, at_most):
    """Run until all is stored; return the exit statuses."""
    statuses = []
    while len(statuses) < at_most and (not statuses or statuses[-1] != 0):
        statuses.append(batch.run().status)
    return statuses


def test_batch_under_every_fault_is_finished_by_a_rerun(service, tmp_path):
    faults = plan_each_fault_once("submit", "status", "download", "task")
    service.active_faults.change(FaultPlan(faults=faults, hang=0.3, slow=0.3))
    batch = Batch(service, tmp_path, FLUX_KONTEXT_POLL_TIMEOUT="5")
    batch.write(lines(ROWS))
    every = {fault.partition("@")[0] for fault in faults}
    for _ in range(1 + len(STOPPING)):
        batch.run()
        if set(service.active_faults.applied) == every:
            break
    assert set(service.active_faults.applied) == every
    service.active_faults.change(FaultPlan())
    last = batch.run()
    found = assert_no_problems(batch)
    # A later run pays for a row that was refused or stopped, and never for an unknown one.
    assert found.unknown == len(UNKNOWN_OUTCOME), last
    assert found.stored == ROWS - len(UNKNOWN_OUTCOME)
    unpaid = sum(fault in NOT_ACCEPTED for fault in UNKNOWN_OUTCOME)
    assert batch.accepted == ROWS - unpaid
    assert found.paid == Decimal("0.03") * batch.accepted
    before = batch.accepted
    batch.run()
    assert batch.accepted == before


@pytest.mark.parametrize("kind", ["status", "download"])
def test_faults_of_free_requests_cost_no_row(service, tmp_path, kind):
    """No row is unknown if no submit's reply is lost, so every row is stored."""
    service.active_faults.change(FaultPlan(faults=plan_each_fault_once(kind), hang=0.3, slow=0.3))
    batch = Batch(service, tmp_path)
    batch.write(lines(40))
    run_until_done(batch, at_most=4)
    assert batch.accepted == 40
    assert assert_no_problems(batch).stored == 40


@pytest.mark.parametrize(
    ("fault", "rows"), [("status:foreign-result-url", 4), ("download:redirect-away@2", 1)]
)
def test_row_with_a_refused_result_url_is_outstanding(service, tmp_path, fault, rows):
    service.active_faults.change(FaultPlan(faults=[fault]))
    batch = Batch(service, tmp_path)
    batch.write(lines(4))
    first = batch.run()
    assert first.status == 1
    assert f"{4 - rows} of 4 rows stored" in first.said
    assert f"{rows} outstanding (paid for, not yet stored)" in first.said
    assert f"RefusedUrlError {rows}" in first.said
    assert "only http and https are allowed" in first.said
    service.active_faults.change(FaultPlan())
    assert batch.run().status == 0
    assert batch.accepted == 4
    assert assert_no_problems(batch).stored == 4
