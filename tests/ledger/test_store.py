"""Records on every kind of filesystem: creation, reads, outages and damage."""

import asyncio
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from fsspec.implementations.local import LocalFileSystem

from prefect_flux_kontext.errors import FluxKontextError, LedgerError
from prefect_flux_kontext.ledger import store as store_module
from prefect_flux_kontext.ledger.ledger import Ledger
from prefect_flux_kontext.ledger.store import RecordStore
from prefect_flux_kontext.manifest.row import make_row

pytestmark = pytest.mark.anyio

OUTAGES = [
    OSError(5, "input/output error"),
    OSError(28, "no space left on device"),
    PermissionError(13, "forbidden"),
    ConnectionResetError(104, "reset"),
    TimeoutError("slow"),
    RuntimeError("strange"),
]
STEPS = ["intent", "posted", "ended"]


async def test_store_creates_a_record_once_and_reads_it(store):
    assert await store.read("rows/aa/1.json") is None
    assert await store.create("rows/aa/1.json", b"one")
    assert not await store.create("rows/aa/1.json", b"two")
    assert await store.read("rows/aa/1.json") == b"one"
    assert await store.list_names("rows/aa") == ["1.json"]


async def test_store_replaces_and_removes_a_record(store):
    await store.replace("owners/1.json", b"one")
    await store.replace("owners/1.json", b"two")
    assert await store.read("owners/1.json") == b"two"
    await store.remove("owners/1.json")
    await store.remove("owners/1.json")
    assert await store.read("owners/1.json") is None
    assert await store.list_names("owners") == []


async def test_names_of_a_missing_folder_are_empty(store):
    assert await store.list_names("waves") == []


def test_create_succeeds_in_one_of_16_threads(root):
    """Each thread has its own event loop and store, as a process would."""

    names = 10 if root.startswith("s3") else 50  # the server of the tests is slow

    def race(who):
        async def create_all():
            store = RecordStore(root)
            return [
                number
                for number in range(names)
                if await store.create(f"rows/aa/{number}.json", f"{who}".encode())
            ]

        return asyncio.run(create_all())

    with ThreadPoolExecutor(16) as threads:
        won = list(threads.map(race, range(16)))
    assert sorted(number for numbers in won for number in numbers) == list(range(names))

    async def contents():
        store = RecordStore(root)
        return [int(await store.read(f"rows/aa/{number}.json")) for number in range(names)]

    winners = asyncio.run(contents())
    assert [number in won[winner] for number, winner in enumerate(winners)] == [True] * names


def test_create_succeeds_in_one_of_two_processes(tmp_path):
    code = (
        "import asyncio, json, os, sys\n"
        "from prefect_flux_kontext.ledger.store import RecordStore\n"
        "async def main():\n"
        "    store = RecordStore(sys.argv[1])\n"
        "    mine = b'%d' % os.getpid()\n"
        "    won = [n for n in range(200) if await store.create(f'{n}.json', mine)]\n"
        "    print(json.dumps(won))\n"
        "input()\n"
        "asyncio.run(main())\n"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    won = [json.loads(process.communicate()[0]) for process in both]
    assert sorted(won[0] + won[1]) == list(range(200))
    assert not list(tmp_path.glob(".*"))


async def test_create_recognizes_its_record_after_a_lost_reply(store, faulty, monkeypatch):
    if isinstance(store._fs, LocalFileSystem):
        _lose_replies_of_the_disk(monkeypatch, times=2)
    else:
        faulty(store, {"pipe_file"}, ConnectionResetError("lost"), effect=True, times=2)
    assert await store.create("1.json", b"ours")
    assert await store.read("1.json") == b"ours"


async def test_create_fails_after_a_lost_reply_if_another_was_first(store, faulty, monkeypatch):
    await store.create("1.json", b"theirs")
    if isinstance(store._fs, LocalFileSystem):
        _lose_replies_of_the_disk(monkeypatch, times=2)
    else:
        faulty(store, {"pipe_file"}, ConnectionResetError("lost"), effect=True, times=2)
    assert not await store.create("1.json", b"ours")
    assert await store.read("1.json") == b"theirs"


def _lose_replies_of_the_disk(monkeypatch, times):
    create, left = store_module.create_file, [times]
    monkeypatch.setattr(store_module, "jittered_backoff", lambda *_, **__: 0)

    def lost(fs, path, data):
        try:
            create(fs, path, data)
        except FileExistsError:
            if not left[0]:
                raise
        if left[0]:
            left[0] -= 1
            raise OSError(5, "no reply")

    monkeypatch.setattr(store_module, "create_file", lost)


@pytest.mark.parametrize("error", OUTAGES, ids=lambda error: type(error).__name__)
async def test_outage_is_never_read_as_absence(store, faulty, error):
    faulty(store, {"cat_file", "ls"}, error)
    with pytest.raises(LedgerError, match=r"1\.json could not be reached after 4 attempts"):
        await store.read("1.json")
    with pytest.raises(LedgerError, match="waves"):
        await store.list_names("waves")


@pytest.mark.parametrize("error", [*OUTAGES, FileNotFoundError("no such bucket")])
async def test_write_error_names_the_record(store, faulty, monkeypatch, error):
    def refuse(*_, **__):
        raise error

    for how in ("create_file", "replace_file"):
        monkeypatch.setattr(store_module, how, refuse)
    faulty(store, {"pipe_file"}, error)
    with pytest.raises(LedgerError, match=r"rows/1\.json"):
        await store.create("rows/1.json", b"1")
    with pytest.raises(LedgerError, match=r"rows/1\.json"):
        await store.replace("rows/1.json", b"1")


async def test_transient_error_is_retried(store, faulty):
    await store.create("1.json", b"one")
    hiccup = faulty(store, {"cat_file"}, TimeoutError("slow"), times=3)
    assert await store.read("1.json") == b"one"
    assert hiccup.times == 0


@pytest.mark.parametrize("root", ["disk"], indirect=True)
@pytest.mark.parametrize("damage", [b"", b"{", b'{"key":', b"null", b"[]", b"\0" * 64, b"{}"])
@pytest.mark.parametrize("step", STEPS)
async def test_damaged_record_stops_its_row_and_is_named(store, step, damage):
    ledger = Ledger(store, "o", {"pro": 0.03, "max": 0.06})
    row = make_row(2, {"id": "a", "prompt": "a lighthouse"})
    entry = await ledger.claim(row, await ledger.read("k" * 32))
    name = f"rows/kk/{'k' * 32}.1.{step}.json"
    await store.replace(name, damage)
    with pytest.raises(LedgerError, match="is damaged") as refused:
        await ledger.read(entry.key)
    assert f"{store}/{name}" in str(refused.value)


@pytest.mark.parametrize("change", [{"attempt": 0}, {"attempt": 2}, {"key": "l" * 32}])
async def test_record_of_another_attempt_stops_its_row(tmp_path, change):
    """Attempt 0 that was rejected would be read again and again."""
    store = RecordStore(str(tmp_path))
    ledger = Ledger(store, "o", {"pro": 0.03, "max": 0.06})
    row = make_row(2, {"id": "a", "prompt": "a lighthouse"})
    entry = await ledger.claim(row, await ledger.read("k" * 32))
    await ledger.record_rejected(entry, FluxKontextError("no"))
    file = tmp_path / f"rows/kk/{entry.key}.1.intent.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(LedgerError, match="about another row or attempt"):
        await ledger.read(entry.key)


async def test_record_cut_at_any_byte_stops_its_row(tmp_path):
    store = RecordStore(str(tmp_path))
    ledger = Ledger(store, "o", {"pro": 0.03, "max": 0.06})
    row = make_row(2, {"id": "a", "prompt": "a lighthouse"})
    entry = await ledger.claim(row, await ledger.read("k" * 32))
    file = tmp_path / f"rows/kk/{entry.key}.1.intent.json"
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(LedgerError, match="is damaged"):
            await ledger.read(entry.key)


async def test_claim_succeeds_for_one_of_many_runs(root):
    row = make_row(2, {"id": "a", "prompt": "a lighthouse"})
    ledgers = [Ledger(RecordStore(root), f"o{n}", {"pro": 0.03}) for n in range(8)]
    entry = await ledgers[0].read("k" * 32)
    claims = await asyncio.gather(
        *(ledger.claim(row, entry) for ledger in ledgers), return_exceptions=True
    )
    won = [claim for claim in claims if not isinstance(claim, Exception)]
    assert [type(claim).__name__ for claim in claims].count("RowAlreadyClaimedError") == 7
    assert await ledgers[0].read("k" * 32) == won[0]


async def test_first_outcome_of_a_post_takes_precedence(store):
    ledger = Ledger(store, "o", {"pro": 0.03, "max": 0.06})
    row = make_row(2, {"id": "a", "prompt": "a lighthouse"})
    entry = await ledger.claim(row, await ledger.read("k" * 32))
    assert (await ledger.record_accepted(entry, "task_1")).posted.task_id == "task_1"
    assert (await ledger.record_accepted(entry, "task_2", by="person")).posted.task_id == "task_1"
    assert (await ledger.read(entry.key)).posted.task_id == "task_1"
