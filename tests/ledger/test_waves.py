"""The end of a wave: ended rows go to its file, outstanding and unknown rows stay open."""

import pytest

from prefect_flux_kontext.errors import GenerationFailedError, LedgerError
from prefect_flux_kontext.ledger.ledger import Ledger
from prefect_flux_kontext.ledger.waves import (
    OpenWave,
    close_wave,
    delete_wave,
    open_wave,
    read_finished_rows,
    read_open_waves,
)
from prefect_flux_kontext.manifest.row import make_row

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.parametrize("root", ["disk", "memory"], indirect=True),
]
WAVE = OpenWave(name="run-000001", owner="o", keys=["k1", "k2", "k3", "k4", "k5"])
FAILED = GenerationFailedError("no", task_id="task_1", code="GENERATION_FAILED")


@pytest.fixture
def ledger(store):
    return Ledger(store, "o", {"pro": 0.03, "max": 0.06})


async def entry(ledger, key, outcome):
    row = make_row(2, {"id": key, "prompt": key})
    entry = await ledger.read(key)
    if outcome == "planned":
        return entry
    entry = await ledger.claim(row, entry)
    if outcome == "intent":
        return entry
    if outcome == "rejected":
        return await ledger.record_rejected(entry, FAILED)
    entry = await ledger.record_accepted(entry, f"task_{key}")
    if outcome == "stored":
        return await ledger.record_stored(entry, [f"{key}.jpg"], [])
    return await ledger.record_failed(entry, FAILED) if outcome == "failed" else entry


async def read_states(store):
    return {row.key: row.ended.state async for row in read_finished_rows(store)}


async def list_open_keys(store):
    return [key async for wave in read_open_waves(store) for key in wave.keys]


async def test_close_wave_leaves_one_file_if_all_rows_ended(store, ledger):
    await open_wave(store, WAVE)
    assert await list_open_keys(store) == WAVE.keys
    await close_wave(store, WAVE, [await entry(ledger, key, "stored") for key in WAVE.keys])
    assert await list_open_keys(store) == []
    assert await store.list_names("waves") == ["run-000001.jsonl"]
    assert await read_states(store) == dict.fromkeys(WAVE.keys, "stored")


async def test_close_wave_keeps_outstanding_and_unknown_rows_open(store, ledger):
    outcomes = ["intent", "accepted", "failed", "rejected"]
    entries = [await entry(ledger, *pair) for pair in zip(WAVE.keys, outcomes, strict=False)]
    await close_wave(store, WAVE, entries)
    assert await list_open_keys(store) == ["k1", "k2", "k5"]
    assert await read_states(store) == {"k3": "failed"}


async def test_close_wave_leaves_nothing_if_nothing_was_paid(store, ledger):
    await open_wave(store, WAVE)
    await close_wave(store, WAVE, [await entry(ledger, key, "planned") for key in WAVE.keys])
    assert await store.list_names("waves") == []


async def test_wave_file_has_the_cost_of_all_attempts(store, ledger):
    await entry(ledger, "k1", "failed")
    await close_wave(store, WAVE, [await entry(ledger, "k1", "stored")])
    row = [row async for row in read_finished_rows(store)]
    assert [(r.attempt, r.failures, round(r.spent, 4)) for r in row] == [(2, 1, 0.06)]


async def test_delete_wave_twice_removes_it(store):
    await open_wave(store, WAVE)
    await delete_wave(store, WAVE)
    await delete_wave(store, WAVE)
    assert await list_open_keys(store) == []


async def test_damaged_wave_file_is_named(store):
    await store.replace("waves/run-000001.jsonl", b'{"key": "k1"')
    with pytest.raises(LedgerError, match=r"run-000001\.jsonl is damaged"):
        await read_states(store)


async def test_damaged_open_wave_is_named(store):
    await store.replace("waves/run-000001.open.json", b"")
    with pytest.raises(LedgerError, match=r"run-000001\.open\.json is damaged"):
        await list_open_keys(store)


async def test_wave_that_ends_while_it_is_listed_is_skipped(store, monkeypatch):
    await open_wave(store, WAVE)
    names = store.list_names

    async def then_it_ends(folder):
        listed = await names(folder)
        await delete_wave(store, WAVE)
        return listed

    monkeypatch.setattr(store, "list_names", then_it_ends)
    assert await list_open_keys(store) == []
