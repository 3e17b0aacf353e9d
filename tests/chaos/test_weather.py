"""Every fault befalls one batch, and the money is right to the row and the cent."""

from decimal import Decimal

import pytest

from prefect_flux_kontext.sandbox.faults.plan import FaultPlan
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from tests.chaos.processes import Batch
from tests.chaos.test_kills import assert_kept, lines
from tests.chaos.troubles import DOUBTFUL, NOT_ACCEPTED, STOPPING, each_once

ROWS = 90
QUICK = SandboxSettings(mean=0.3, long_edge=16)


@pytest.fixture
def service():
    with running_sandbox(QUICK) as sandbox:
        yield sandbox


def run_until_done(batch, *, at_most):
    """Run again and again; statuses as they came."""
    statuses = []
    while len(statuses) < at_most and (not statuses or statuses[-1] != 0):
        statuses.append(batch.run().status)
    return statuses


def test_every_fault_befalls_a_batch_and_it_is_finished_by_the_same_command(service, tmp_path):
    faults = each_once("submit", "status", "download", "task")
    service.weather.change(FaultPlan(faults=faults, hang=0.3, slow=0.3))
    batch = Batch(service, tmp_path, FLUX_KONTEXT_POLL_TIMEOUT="5")
    batch.write(lines(ROWS))
    every = {fault.partition("@")[0] for fault in faults}
    for _ in range(1 + len(STOPPING)):
        batch.run()
        if set(service.weather.befallen) == every:
            break
    assert set(service.weather.befallen) == every
    service.weather.change(FaultPlan())
    last = batch.run()
    found = assert_kept(batch)
    # A row that was refused or stopped is paid for by a later run; one in doubt never is.
    assert found.unknown == len(DOUBTFUL), last
    assert found.stored == ROWS - len(DOUBTFUL)
    unpaid = sum(fault in NOT_ACCEPTED for fault in DOUBTFUL)
    assert batch.accepted == ROWS - unpaid
    assert found.paid == Decimal("0.03") * batch.accepted
    before = batch.accepted
    batch.run()
    assert batch.accepted == before


@pytest.mark.parametrize("kind", ["status", "download"])
def test_whatever_befalls_what_is_free_costs_no_row(service, tmp_path, kind):
    """Nothing is in doubt where no submit's reply is lost, so every row is stored."""
    service.weather.change(FaultPlan(faults=each_once(kind), hang=0.3, slow=0.3))
    batch = Batch(service, tmp_path)
    batch.write(lines(40))
    run_until_done(batch, at_most=4)
    assert batch.accepted == 40
    assert assert_kept(batch).stored == 40


@pytest.mark.parametrize(
    ("fault", "rows"), [("status:foreign-result-url", 4), ("download:redirect-away@2", 1)]
)
def test_a_row_whose_result_is_refused_is_outstanding_and_the_others_go_on(
    service, tmp_path, fault, rows
):
    service.weather.change(FaultPlan(faults=[fault]))
    batch = Batch(service, tmp_path)
    batch.write(lines(4))
    first = batch.run()
    assert first.status == 1
    assert f"{4 - rows} of 4 rows stored" in first.said
    assert f"{rows} outstanding (paid for, not yet stored)" in first.said
    assert f"RefusedUrlError {rows}" in first.said
    assert "only http and https are allowed" in first.said
    service.weather.change(FaultPlan())
    assert batch.run().status == 0
    assert batch.accepted == 4
    assert assert_kept(batch).stored == 4
