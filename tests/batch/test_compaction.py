"""Compaction: everything reads the same afterwards, and nothing is ever paid for again."""

import asyncio
import itertools
import random
from dataclasses import replace

import pytest

from prefect_flux_kontext.batch import compaction
from prefect_flux_kontext.batch.compaction import compact_ledger
from prefect_flux_kontext.batch.repair import rebuild_waves
from prefect_flux_kontext.batch.status import read_ledger_status
from prefect_flux_kontext.errors import ConfigurationError, LedgerError
from prefect_flux_kontext.ledger import ledger as ledger_module
from prefect_flux_kontext.ledger.heartbeat import keep_heartbeat
from prefect_flux_kontext.ledger.ledger import Ledger, RowAlreadyClaimedError
from prefect_flux_kontext.ledger.packs import announce_packs, create_pack
from prefect_flux_kontext.ledger.records import Entry, State
from prefect_flux_kontext.ledger.store import RecordStore
from prefect_flux_kontext.ledger.waves import OpenWave, close_wave, open_wave
from prefect_flux_kontext.manifest.row import make_row
from tests.support.ledgers import FAILED, pay
from tests.support.plans import PRICES
from tests.support.s3 import s3_server

pytestmark = pytest.mark.anyio

_numbers = itertools.count()
OUTCOMES = ["stored", "retried", "failed", "rejected", "accepted", "unknown"]


@pytest.fixture(autouse=True)
def small_packs(monkeypatch):
    monkeypatch.setattr(compaction, "_MIN_ROWS", 1)


@pytest.fixture(scope="module")
def s3():
    with s3_server() as (url, _):
        yield url


@pytest.fixture(params=["disk", "s3"])
def store(request, tmp_path):
    if request.param == "disk":
        return RecordStore(str(tmp_path))
    return RecordStore(f"{request.getfixturevalue('s3')}/{tmp_path.name}")


@pytest.fixture
def faulty_packs(monkeypatch):
    async def fail(*_, **__):
        raise LedgerError("out of order")

    return lambda ledger: monkeypatch.setattr(ledger._packs, "find", fail)


async def compact(store):
    last = None
    async for done in compact_ledger(store):
        last = done
    return last


async def fill(store, *, outcomes=OUTCOMES, owner="gone"):
    """Write a finished wave with rows of all outcomes, and return the rows by outcome."""
    ledger = Ledger(store, owner, PRICES)
    rows = [make_row(n, {"prompt": f"{owner} {n}"}) for n in range(len(outcomes))]
    wave = OpenWave(name=f"{owner}-1", owner=owner, keys=[row.key for row in rows])
    await open_wave(store, wave)
    entries = [await pay(ledger, *pair) for pair in zip(rows, outcomes, strict=True)]
    await close_wave(store, wave, entries)
    return dict(zip(outcomes, rows, strict=True))


async def read_all(store, rows):
    """Return what every reader of the ledger gets."""
    ledger = Ledger(store, "", {})
    status = await read_ledger_status(store)
    return (
        [await ledger.read(row.key) for row in rows],
        [await ledger.read_task_ids(row.key) for row in rows],
        (status.states, status.spent, status.doubtful),
        status.outstanding + status.unknown,
    )


async def list_record_files(store):
    return [
        name
        for prefix in await store.list_names("rows")
        for name in await store.list_names(f"rows/{prefix}")
    ]


async def test_compaction_changes_nothing_that_is_read(store):
    by_outcome = await fill(store)
    rows = by_outcome.values()
    before = await read_all(store, rows)
    done = await compact(store)
    assert (done.rows, done.removed, done.left) == (2, 3 + 6, 4)
    assert await read_all(store, rows) == before
    packed = {by_outcome["stored"].key, by_outcome["retried"].key}
    left = {name.partition(".")[0] for name in await list_record_files(store)}
    assert left == {row.key for row in rows} - packed


async def test_compaction_repeated_does_nothing(store):
    rows = (await fill(store)).values()
    await compact(store)
    before = await read_all(store, rows)
    again = await compact(store)
    assert (again.rows, again.packs, again.removed, again.left) == (0, 0, 0, 4)
    assert await read_all(store, rows) == before


async def test_later_runs_are_packed_beside_earlier_ones(store):
    first = await fill(store)
    await compact(store)
    second = await fill(store, owner="later")
    rows = [*first.values(), *second.values()]
    before = await read_all(store, rows)
    assert (await compact(store)).rows == 2
    assert await read_all(store, rows) == before


async def test_packed_rows_are_not_claimed_by_stale_runs(store):
    stale, rows = Ledger(store, "frozen", PRICES), await fill(store)
    planned = Entry(key=rows["stored"].key)
    attempt = (await stale.read(rows["retried"].key)).model_copy(
        update={"attempt": 1, "posted": None, "ended": None, "intent": None}
    )
    await stale.read("0" * 32)  # looks for packs, of which there are none yet
    await compact(store)
    for row, entry in ((rows["stored"], planned), (rows["retried"], attempt)):
        with pytest.raises(RowAlreadyClaimedError):
            await stale.claim(row, entry)
        assert (await stale.read(row.key)).state is State.STORED
        assert (await Ledger(store, "new", PRICES).read(row.key)).state is State.STORED
    assert (await compact(store)).removed == 2  # what the stale run left behind


async def test_packs_of_later_compactions_are_found(store):
    first = make_row(1, {"prompt": "a lighthouse"})
    second = replace(make_row(2, {"prompt": "a harbour"}), key=first.key[:2] + "0" * 30)
    payer, stale = Ledger(store, "gone", PRICES), Ledger(store, "frozen", PRICES)
    await pay(payer, first, "stored")
    await compact(store)
    assert (await stale.read(first.key)).state is State.STORED
    await pay(payer, second, "stored")
    await compact(store)
    with pytest.raises(RowAlreadyClaimedError):
        await stale.claim(second, Entry(key=second.key))


async def test_other_rows_are_claimed_after_a_compaction(store):
    rows = await fill(store)
    await compact(store)
    ledger = Ledger(store, "new", PRICES)
    new = make_row(9, {"prompt": "another"})
    assert (await pay(ledger, new, "stored")).state is State.STORED
    retried = await ledger.claim(rows["failed"], await ledger.read(rows["failed"].key))
    assert retried.attempt == 2


async def test_repair_finds_packed_rows(store):
    rows = (await fill(store)).values()
    before = await read_all(store, rows)
    await compact(store)
    for name in await store.list_names("waves"):
        await store.remove(f"waves/{name}")
    assert (await rebuild_waves(store)).rows == len(OUTCOMES)
    states = (await read_all(store, rows))[2]
    assert states[1:] == before[2][1:]
    assert states[0]["stored"] == 2


async def test_interrupted_compaction_is_completed(tmp_path, monkeypatch):
    """It stops before each of its operations on the store in turn."""
    run = RecordStore._run
    for stop in range(1_000):
        store = RecordStore(str(tmp_path / str(stop)))
        rows = (await fill(store)).values()
        before, left = await read_all(store, rows), stop

        async def run_until_stop(self, name, action, *passes):
            nonlocal left
            left -= 1
            if left < 0:
                raise LedgerError("stopped")
            return await run(self, name, action, *passes)

        with monkeypatch.context() as patch:
            patch.setattr(RecordStore, "_run", run_until_stop)
            try:
                await compact(store)
            except (LedgerError, ConfigurationError):
                pass
            else:
                break
        for name in await store.list_names("owners"):  # the stopped process seems to live
            await store.remove(f"owners/{name}")
        assert await read_all(store, rows) == before
        await compact(store)
        assert await read_all(store, rows) == before
        assert {name[:32] for name in await list_record_files(store)} == {
            entry.key for entry in before[0] if entry.state is not State.STORED
        }
    assert stop > 30


class SteppedStore(RecordStore):
    """A store whose operations run in a given order, one at a time."""

    def __init__(self, root):
        super().__init__(root)
        self.waiting = []

    async def wait_for_turn(self):
        turn = asyncio.get_running_loop().create_future()
        self.waiting.append(turn)
        await turn

    async def _run(self, name, action, *passes):
        await self.wait_for_turn()
        return action()

    async def run(self, random, *actions):
        tasks = [asyncio.create_task(action) for action in actions]
        while not all(task.done() for task in tasks):
            for _ in range(20):
                await asyncio.sleep(0)
            if self.waiting:
                self.waiting.pop(random.randrange(len(self.waiting))).set_result(None)
        for task in tasks:
            task.result()


@pytest.mark.parametrize("start", range(0, 300, 60))
async def test_no_interleaving_pays_twice(start):
    """Runs that read the row before it was stored claim it while a compaction is under way."""
    for seed in range(start, start + 60):
        await interleave(random.Random(seed))


async def interleave(random):
    url = f"memory://interleaved-{next(_numbers)}"
    plain, store = RecordStore(url), SteppedStore(url)
    row = make_row(1, {"prompt": "a lighthouse"})
    neighbour = replace(make_row(2, {"prompt": "a harbour"}), key=row.key[:2] + "0" * 30)
    runs = [Ledger(store, f"run {n}", PRICES) for n in range(3)]
    for ledger in runs[:2]:  # these have looked for packs before, and found none
        ledger._packs._store = plain
        await ledger._packs.find(row.key)
        ledger._packs._store = store
    payer, rows = Ledger(plain, "first", PRICES), (row, neighbour)
    stored = [await pay(payer, each, "stored") for each in rows]

    async def run_again(ledger):
        for _ in range(random.randrange(40)):
            await store.wait_for_turn()
        entry = Entry(key=row.key)
        while entry.state is not State.STORED:
            with pytest.raises(RowAlreadyClaimedError):
                await ledger.claim(row, entry)
            entry = await ledger.read(row.key)

    await store.run(random, compact(store), *map(run_again, runs))
    last = Ledger(plain, "last", PRICES)
    assert [await last.read(each.key) for each in rows] == stored
    with pytest.raises(RowAlreadyClaimedError):
        await last.claim(row, Entry(key=row.key))


async def test_packs_that_are_not_announced_remove_nothing(store, monkeypatch):
    """A compaction is frozen after it announced its packs; another has only created one."""
    first = make_row(1, {"prompt": "a lighthouse"})
    late = replace(make_row(2, {"prompt": "a harbour"}), key=first.key[:2] + "0" * 30)
    payer, stale = Ledger(store, "payer", PRICES), Ledger(store, "frozen", PRICES)
    await pay(payer, first, "stored")

    async def announce(store):
        await announce_packs(store)
        assert (await stale.read(late.key)).state is State.PLANNED  # lists the packs
        await pay(payer, late, "stored")
        folder = late.key[:2]
        steps = ("intent", "posted", "ended")
        records = {
            f"1.{step}": await store.read(f"rows/{folder}/{late.key}.1.{step}.json")
            for step in steps
        }
        await create_pack(store, folder, {late.key: records})

    monkeypatch.setattr(compaction, "announce_packs", announce)
    await compact(store)
    with pytest.raises(RowAlreadyClaimedError):
        await stale.claim(late, Entry(key=late.key))


async def test_outcome_of_a_frozen_post_does_not_hide_a_packed_row(store, monkeypatch):
    monkeypatch.setattr(ledger_module, "_LONG_POST_SECONDS", -1)
    row = make_row(1, {"prompt": "a lighthouse"})
    frozen, payer = Ledger(store, "frozen", PRICES), Ledger(store, "payer", PRICES)
    posted = await frozen.claim(row, await frozen.read(row.key))
    given_up = await payer.record_rejected(await payer.read(row.key), FAILED, by="person")
    entry = await payer.record_accepted(await payer.claim(row, given_up), "task_2")
    stored = await payer.record_stored(entry, ["x.jpg"], [])
    await compact(store)
    assert await frozen.record_accepted(posted, "task_1") == stored


async def test_claim_that_cannot_look_for_packs_is_rejected(store, faulty_packs):
    row = make_row(1, {"prompt": "a lighthouse"})
    ledger = Ledger(store, "us", PRICES)
    entry = await ledger.read(row.key)
    faulty_packs(ledger)
    with pytest.raises(LedgerError, match="out of order"):
        await ledger.claim(row, entry)
    assert (await Ledger(store, "us", PRICES).read(row.key)).state is State.REJECTED


async def test_compaction_refuses_while_a_run_lives(store):
    await fill(store)
    async with keep_heartbeat(store):
        with pytest.raises(ConfigurationError, match="its ledger cannot be compacted"):
            await compact(store)
    assert await store.list_names("packs") == []


async def test_compaction_refuses_where_nothing_may_be_removed(store, monkeypatch):
    await fill(store)
    before = await list_record_files(store)

    async def refuse(_store, name):
        raise LedgerError(f"{name} may not be removed")

    monkeypatch.setattr(RecordStore, "remove", refuse)
    with pytest.raises(ConfigurationError, match="permission to remove files"):
        await compact(store)
    assert await list_record_files(store) == before
    assert await store.list_names("packs") == []


async def test_damaged_records_are_not_packed(store):
    rows = await fill(store)
    key = rows["stored"].key
    name = f"rows/{key[:2]}/{key}.1.ended.json"
    await store.replace(name, b"{")
    with pytest.raises(LedgerError, match="is damaged"):
        await compact(store)
    assert await store.read(name) == b"{"


@pytest.mark.parametrize("damage", ["cut", "emptied", "another row"])
async def test_damaged_pack_stops_payment(store, damage):
    key = (await fill(store))["stored"].key
    await compact(store)
    folder = f"packs/{key[:2]}"
    (name,) = await store.list_names(folder)
    data = await store.read(f"{folder}/{name}")
    damaged = {"cut": data[:-40], "emptied": b"", "another row": data.replace(b"key", b"kez")}
    await store.replace(f"{folder}/{name}", damaged[damage])
    problem = f"/packs/{key[:2]}/.* (is damaged|could not be reached)"
    with pytest.raises(LedgerError, match=problem):
        await Ledger(store, "new", PRICES).read(key)


async def test_rows_of_open_waves_keep_their_files(store):
    rows = await fill(store, outcomes=["stored"])
    key = rows["stored"].key
    await open_wave(store, OpenWave(name="open", owner="open", keys=[key]))
    done = await compact(store)
    assert (done.rows, done.left) == (0, 1)


async def test_few_rows_keep_their_files(store, monkeypatch):
    monkeypatch.setattr(compaction, "_MIN_ROWS", 2)
    await fill(store)
    done = await compact(store)
    assert done.left == len(OUTCOMES) - done.rows
    assert (done.rows == 0) is (done.packs == 0)
