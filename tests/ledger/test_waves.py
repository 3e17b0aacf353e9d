"""A wave's end: what has ended goes to its part, what is owed stays named."""

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
        return await ledger.rejected(entry, FAILED)
    entry = await ledger.accepted(entry, f"task_{key}")
    if outcome == "stored":
        return await ledger.stored(entry, [f"{key}.jpg"], [])
    return await ledger.failed(entry, FAILED) if outcome == "failed" else entry


async def parts(store):
    return {row.key: row.ended.state async for row in read_finished_rows(store)}


async def named(store):
    return [key async for wave in read_open_waves(store) for key in wave.keys]


async def test_a_wave_that_is_all_ended_leaves_one_part(store, ledger):
    await open_wave(store, WAVE)
    assert await named(store) == WAVE.keys
    await close_wave(store, WAVE, [await entry(ledger, key, "stored") for key in WAVE.keys])
    assert await named(store) == []
    assert await store.names("waves") == ["run-000001.jsonl"]
    assert await parts(store) == dict.fromkeys(WAVE.keys, "stored")


async def test_what_is_owed_or_not_known_stays_named(store, ledger):
    outcomes = ["intent", "accepted", "failed", "rejected"]
    entries = [await entry(ledger, *pair) for pair in zip(WAVE.keys, outcomes, strict=False)]
    await close_wave(store, WAVE, entries)
    assert await named(store) == ["k1", "k2", "k5"]
    assert await parts(store) == {"k3": "failed"}


async def test_a_wave_in_which_nothing_was_paid_leaves_nothing(store, ledger):
    await open_wave(store, WAVE)
    await close_wave(store, WAVE, [await entry(ledger, key, "planned") for key in WAVE.keys])
    assert await store.names("waves") == []


async def test_a_part_tells_what_all_attempts_cost(store, ledger):
    await entry(ledger, "k1", "failed")
    await close_wave(store, WAVE, [await entry(ledger, "k1", "stored")])
    row = [row async for row in read_finished_rows(store)]
    assert [(r.attempt, r.failures, round(r.spent, 4)) for r in row] == [(2, 1, 0.06)]


async def test_a_forgotten_wave_is_forgotten(store):
    await open_wave(store, WAVE)
    await delete_wave(store, WAVE)
    await delete_wave(store, WAVE)
    assert await named(store) == []


async def test_a_damaged_part_is_named(store):
    await store.replace("waves/run-000001.jsonl", b'{"key": "k1"')
    with pytest.raises(LedgerError, match=r"run-000001\.jsonl is damaged"):
        await parts(store)


async def test_a_damaged_list_of_rows_is_named(store):
    await store.replace("waves/run-000001.open.json", b"")
    with pytest.raises(LedgerError, match=r"run-000001\.open\.json is damaged"):
        await named(store)


async def test_a_wave_that_ends_between_listing_and_reading_is_no_trouble(store, monkeypatch):
    await open_wave(store, WAVE)
    names = store.names

    async def then_it_ends(folder):
        listed = await names(folder)
        await delete_wave(store, WAVE)
        return listed

    monkeypatch.setattr(store, "names", then_it_ends)
    assert await named(store) == []
