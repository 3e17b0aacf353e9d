"""Deferred batches: which rows wait, how long, and what a later run costs."""

import pytest

from prefect_flux_kontext.batch.deferral import PENDING_COLLECTION
from prefect_flux_kontext.batch.status import read_ledger_status
from prefect_flux_kontext.ledger.store import open_ledger_store
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from prefect_flux_kontext.storage.filesystem import OutputFolder
from tests.chaos.simulation import check_environment, in_process, manifest, simulate

LINES = [(f"r{n}", f"row number {n}") for n in range(30)]


def run_simulation(main, **settings):
    return simulate(main, 1, None, SandboxSettings(mean=40, long_edge=16, **settings))


async def status_of(env):
    return await read_ledger_status(open_ledger_store(OutputFolder(env.url)))


def test_deferred_batch_submits_all_and_waits_for_none():
    async def main(env):
        summary = await in_process(env, None, manifest(LINES), deferred=True, slots=100)
        assert (summary.rows, summary.outstanding) == (30, 30)
        assert summary.reasons == {PENDING_COLLECTION: 30}
        assert env.numbers["download"] == 0
        assert env.sandbox.service.bill()["accepted"] == 30
        assert len((await status_of(env)).outstanding) == 30

    run_simulation(main)


def test_later_run_stores_deferred_rows_for_free():
    async def main(env):
        await in_process(env, None, manifest(LINES), deferred=True, slots=100)
        summary = await in_process(env, None, manifest(LINES))
        assert (summary.stored, summary.spent) == (30, 0)
        assert env.sandbox.service.bill()["accepted"] == 30
        assert not (await check_environment(env, LINES, killed=False)).problems

    run_simulation(main)


@pytest.mark.parametrize("slots", [1, 7, 30])
def test_deferred_batch_stores_results_while_slots_are_short(slots):
    async def main(env):
        summary = await in_process(env, None, manifest(LINES), deferred=True, slots=slots)
        assert summary.rows == 30
        assert 0 < summary.outstanding <= slots
        assert summary.stored == 30 - summary.outstanding
        assert env.sandbox.service.bill()["accepted"] == 30
        again = await in_process(env, None, manifest(LINES), slots=slots)
        assert (again.stored, again.spent) == (30, 0)

    run_simulation(main, slots=slots)


def test_equal_rows_do_not_delay_a_deferred_batch():
    async def main(env):
        lines = [("a", "the same"), ("b", "the same"), ("c", "another")]
        summary = await in_process(env, None, manifest(lines), deferred=True)
        assert summary.outstanding == 3
        assert env.numbers["download"] == 0
        assert env.sandbox.service.bill()["accepted"] == 2

    run_simulation(main)


def test_deferred_batch_collects_no_earlier_rows():
    async def main(env):
        await in_process(env, None, manifest(LINES), deferred=True, slots=100)
        summary = await in_process(env, None, manifest([("new", "another row")]), deferred=True)
        assert (summary.rows, summary.outstanding) == (1, 1)
        assert env.numbers["download"] == 0
        assert len((await status_of(env)).outstanding) == 31

    run_simulation(main)
