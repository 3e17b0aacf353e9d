"""Damaged, unwritable and late records: no row is paid twice or lost."""

import pytest

from prefect_flux_kontext.batch.status import read_ledger_status
from prefect_flux_kontext.errors import (
    LedgerError,
)
from prefect_flux_kontext.ledger.records import State
from prefect_flux_kontext.ledger.store import RecordStore
from tests.batch.simulated import (
    LINES,
    SLOW,
    check_invariants,
    fault_on,
    open_store,
    run_simulation,
)
from tests.chaos.checker import read_all
from tests.chaos.simulation import in_process, manifest


def test_late_settling_keeps_other_rows_counted():
    """The file of its old wave has the other rows, so it must not be overwritten."""

    async def main(env):
        await in_process(env, None, manifest(LINES))
        await in_process(env, None, manifest(LINES), resubmit=True)
        status = await read_ledger_status(open_store(env))
        assert status.states == {State.STORED: 10}
        assert status.spent == pytest.approx(0.30)

    run_simulation(main, hook=fault_on("submit", "lost_reply", 2))


def test_damaged_record_stops_only_its_own_row():
    async def main(env):
        await in_process(env, 20, manifest(LINES))
        files = read_all(env.url)
        name = next(name for name in files if name.endswith("posted.json"))
        await RecordStore(env.url).replace(name, b"{")
        assert env.posts > 2
        collected = await in_process(env, None, [], only_collect=True)
        assert (collected.stored, collected.failed) == (env.posts - 1, 1)
        assert name in collected.failures[0].message
        summary = await in_process(env, None, manifest(LINES))
        assert (summary.stored, summary.failed, env.posts) == (9, 1, 10)
        await RecordStore(env.url).replace(name, files[name])
        assert (await in_process(env, None, manifest(LINES))).stored == 10
        await check_invariants(env, LINES)

    run_simulation(main, settings=SLOW)


def test_rows_of_a_damaged_heartbeat_are_not_collected():
    async def main(env):
        await in_process(env, 20, manifest(LINES[:5]))
        name = next(name for name in read_all(env.url) if "/owners/" in name)
        await RecordStore(env.url).replace(name, b"")
        assert (await in_process(env, None, manifest(LINES[5:]))).stored == 5
        await RecordStore(env.url).remove(name)
        assert (await in_process(env, None, [], only_collect=True)).stored == 5

    run_simulation(main, settings=SLOW)


def test_wave_that_cannot_be_opened_pays_for_no_row(monkeypatch):
    replace = RecordStore.replace

    async def refused(self, name, data):
        if name.endswith("-000002.open.json"):
            raise LedgerError("no")
        await replace(self, name, data)

    async def main(env):
        monkeypatch.setattr(RecordStore, "replace", refused)
        assert isinstance(await in_process(env, None, manifest(LINES)), LedgerError)
        monkeypatch.setattr(RecordStore, "replace", replace)
        found = await check_invariants(env, LINES, complete=False)
        assert found.stored == env.posts
        assert (await in_process(env, None, manifest(LINES))).stored == 10

    run_simulation(main)


def test_wave_that_cannot_be_closed_is_read_again(monkeypatch):
    replace = RecordStore.replace

    async def refused(self, name, data):
        if name.startswith("waves/") and name.endswith(".jsonl"):
            raise LedgerError("no")
        await replace(self, name, data)

    async def main(env):
        monkeypatch.setattr(RecordStore, "replace", refused)
        # The collection fails likewise, and then keeps all waves open.
        await in_process(env, None, manifest(LINES))
        monkeypatch.setattr(RecordStore, "replace", replace)
        await check_invariants(env, LINES)
        await in_process(env, None, [], only_collect=True)
        assert (await read_ledger_status(open_store(env))).states == {State.STORED: 10}

    run_simulation(main)


def test_status_counts_every_row_and_every_dollar():
    lines = [*LINES, ("bad", "nsfw")]

    async def main(env):
        await in_process(env, 30, manifest(lines))
        status = await read_ledger_status(open_store(env))
        bill = env.sandbox.service.bill()
        known = status.states[State.ACCEPTED] + status.states[State.STORED]
        known += status.states[State.FAILED]
        assert known + status.states[State.UNKNOWN] >= bill["accepted"] >= known
        assert status.outstanding == sorted(
            status.outstanding, key=lambda entry: entry.task.submitted_at
        )
        await in_process(env, None, manifest(lines))
        status = await read_ledger_status(open_store(env))
        assert status.spent == pytest.approx(float(env.sandbox.service.bill()["dollars"]))
        assert status.states == {State.STORED: 10, State.FAILED: 1}

    run_simulation(main, settings=SLOW)
