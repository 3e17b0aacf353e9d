"""Repair of wave files: whatever they held is rebuilt from the records of the rows."""

import pytest

from prefect_flux_kontext.batch.repair import rebuild_waves
from prefect_flux_kontext.batch.status import read_ledger_status
from prefect_flux_kontext.errors import ConfigurationError, LedgerError
from prefect_flux_kontext.ledger.heartbeat import keep_heartbeat
from prefect_flux_kontext.ledger.ledger import Ledger
from prefect_flux_kontext.ledger.store import RecordStore
from prefect_flux_kontext.ledger.waves import OpenWave, close_wave, open_wave
from prefect_flux_kontext.manifest.row import make_row
from tests.support.ledgers import pay
from tests.support.plans import PRICES

pytestmark = pytest.mark.anyio


@pytest.fixture
def store(tmp_path):
    return RecordStore(str(tmp_path))


@pytest.fixture
async def status(store):
    """The status of a ledger with two waves, one closed and one open, before any damage."""
    ledger = Ledger(store, "gone", PRICES)
    outcomes = ["stored", "failed", "accepted", "unknown", "rejected", "rejected after a failure"]
    for number in (1, 2):
        rows = [make_row(n, {"prompt": f"x {number} {n}"}) for n in range(len(outcomes))]
        wave = OpenWave(name=f"gone-{number}", owner="gone", keys=[row.key for row in rows])
        await open_wave(store, wave)
        entries = [await pay(ledger, *pair) for pair in zip(rows, outcomes, strict=True)]
        if number == 1:
            await close_wave(store, wave, entries)
    return await read_ledger_status(store)


def summarize(status):
    return (
        dict(status.states),
        round(status.spent, 6),
        round(status.doubtful, 6),
        sorted(entry.key for entry in status.outstanding),
        sorted(entry.key for entry in status.unknown),
    )


@pytest.mark.parametrize("damage", ["truncated", "removed", "garbage", "none"])
async def test_repair_restores_the_status(store, status, damage):
    for name in await store.list_names("waves"):
        data = await store.read(f"waves/{name}")
        if damage == "removed":
            await store.remove(f"waves/{name}")
        elif damage != "none":
            await store.replace(f"waves/{name}", data[:-9] if damage == "truncated" else b"\0")
    if damage in ("truncated", "garbage"):
        with pytest.raises(LedgerError, match="flux-kontext repair"):
            await read_ledger_status(store)
    repair = await rebuild_waves(store)
    # Rejected rows that cost nothing need no record in a wave.
    assert (repair.rows, repair.finished) == (12, 4)
    repaired = await read_ledger_status(store)
    assert summarize(repaired)[1:] == summarize(status)[1:]
    assert repaired.states["stored"] == status.states["stored"] == 2
    before = summarize(repaired)
    await rebuild_waves(store)
    assert summarize(await read_ledger_status(store)) == before


async def test_repair_works_where_nothing_may_be_removed(store, status, monkeypatch):
    async def refuse(_name):
        raise LedgerError("not allowed")

    for name in await store.list_names("waves"):
        await store.replace(f"waves/{name}", b"{")
    with monkeypatch.context() as patch:
        patch.setattr(RecordStore, "remove", lambda _store, name: refuse(name))
        await rebuild_waves(store)
    assert summarize(await read_ledger_status(store))[1:] == summarize(status)[1:]


async def test_repair_refuses_while_a_run_lives(store, status):
    async with keep_heartbeat(store):
        with pytest.raises(ConfigurationError, match="Another run"):
            await rebuild_waves(store)
