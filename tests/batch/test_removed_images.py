"""Images that were removed from the output are noticed, and fetched again at no cost."""

import pytest

from prefect_flux_kontext.batch.status import read_ledger_status
from prefect_flux_kontext.client import polling
from prefect_flux_kontext.ledger.store import open_ledger_store
from prefect_flux_kontext.manifest.reader import Manifest
from prefect_flux_kontext.sandbox.faults.plan import FaultPlan
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from prefect_flux_kontext.storage.filesystem import OutputFolder
from tests.support.batches import KEY, run

pytestmark = pytest.mark.anyio


@pytest.fixture
def sandbox():
    with running_sandbox(SandboxSettings(mean=0.05, long_edge=16, api_key=KEY)) as running:
        yield running


def rows(number):
    return Manifest([{"id": n, "prompt": f"a lighthouse {n}"} for n in range(number)])


async def test_removed_image_is_fetched_again_at_no_cost(sandbox, tmp_path):
    await run(sandbox, rows(3), tmp_path)
    kept = (tmp_path / "1.jpg").read_bytes()
    for name in ("0.jpg", "1.jpg"):
        (tmp_path / name).unlink()
    status = await read_ledger_status(
        open_ledger_store(OutputFolder(tmp_path)), OutputFolder(tmp_path)
    )
    assert (status.missing, status.states["stored"]) == (2, 3)
    summary = await run(sandbox, rows(3), tmp_path)
    assert (summary.stored, summary.spent) == (3, 0)
    assert (tmp_path / "1.jpg").read_bytes() == kept
    assert sandbox.service.bill()["accepted"] == 3


async def test_removed_image_that_is_gone_is_reported(sandbox, tmp_path, monkeypatch):
    monkeypatch.setattr(polling, "_UNKNOWN_TASK_GRACE_SECONDS", 1)
    await run(sandbox, rows(3), tmp_path)
    (tmp_path / "0.jpg").unlink()
    sandbox.active_faults.change(FaultPlan(faults=["status:not-found"]))
    summary = await run(sandbox, rows(3), tmp_path)
    assert (summary.stored, summary.failed, summary.spent) == (2, 1, 0)
    assert "has been removed from the output" in summary.failures[0].message
