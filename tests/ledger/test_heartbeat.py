"""Liveness of owners: local ones by process, remote ones by heartbeat; an error is not death."""

import asyncio
import json
import os
import subprocess
import sys
import time

import pytest

from prefect_flux_kontext.errors import FluxKontextError, LedgerError
from prefect_flux_kontext.ledger import heartbeat as owners
from prefect_flux_kontext.ledger.heartbeat import is_alive, keep_heartbeat, wait_for_dead
from prefect_flux_kontext.ledger.ledger import Ledger
from prefect_flux_kontext.ledger.records import State
from prefect_flux_kontext.manifest.row import make_row
from prefect_flux_kontext.storage.atomic import replace_file

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("root", ["disk"], indirect=True)]
PRICES = {"pro": 0.03, "max": 0.06}


async def write_heartbeat(store, **changes):
    heartbeat = {"machine": owners._find_machine(), "pid": os.getpid(), "beat": time.time()}
    heartbeat["started"] = owners._read_process_start(os.getpid())
    await store.replace("owners/them.json", json.dumps(heartbeat | changes).encode())


async def test_run_is_alive_while_it_runs(store):
    async with keep_heartbeat(store) as heartbeat:
        assert await is_alive(store, heartbeat.owner)
    assert not await is_alive(store, heartbeat.owner)
    assert await store.list_names("owners") == []


async def test_owner_without_a_record_is_dead(store):
    assert not await is_alive(store, "nobody")


@pytest.fixture
def process():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as running:
        yield running
        running.kill()


async def test_killed_process_is_dead_immediately(store, process):
    await write_heartbeat(store, pid=process.pid, started=owners._read_process_start(process.pid))
    assert await is_alive(store, "them")
    process.kill()
    process.wait()
    assert not await is_alive(store, "them")


async def test_suspended_process_is_alive_with_any_heartbeat(store):
    await write_heartbeat(store, beat=0)
    assert await is_alive(store, "them")


async def test_process_with_a_reused_id_is_not_the_owner(store):
    await write_heartbeat(store, started="1")
    assert not await is_alive(store, "them")


@pytest.mark.parametrize(("age", "lives"), [(0, True), (30, True), (-30, True), (90, False)])
async def test_remote_run_is_alive_while_its_heartbeat_is_fresh(store, age, lives):
    await write_heartbeat(store, machine="elsewhere", pid=1, beat=time.time() - age)
    assert await is_alive(store, "them") is lives


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"null", b"[]", b"{}", b'{"machine": "elsewhere", "beat": "soon"}']
)
async def test_damaged_heartbeat_raises(store, damage):
    await store.replace("owners/them.json", damage)
    with pytest.raises(LedgerError, match=r"owners/them\.json is damaged"):
        await is_alive(store, "them")


async def test_process_of_another_pid_namespace_is_judged_by_its_beat(store):
    """Two containers may share a host name, and a process id means nothing in the other one."""
    boot = owners._find_machine().partition(" ")[0]
    gone = {"machine": f"{boot} pid:[1]", "pid": 2**22 + 1, "started": "1"}
    await write_heartbeat(store, **gone)
    assert await is_alive(store, "them")
    await write_heartbeat(store, **gone, beat=time.time() - 90)
    assert not await is_alive(store, "them")


async def test_hidden_process_is_judged_by_its_beat(store, monkeypatch):
    await write_heartbeat(store)
    monkeypatch.setattr(owners, "_read_process_start", lambda _pid: owners._UNREADABLE)
    assert await is_alive(store, "them")
    await write_heartbeat(store, started="1", beat=time.time() - 90)
    assert not await is_alive(store, "them")


async def test_beat_interval_is_that_of_the_record(store):
    await write_heartbeat(store, machine="elsewhere", beat=time.time() - 30, beat_seconds=5)
    assert not await is_alive(store, "them")
    await write_heartbeat(store, machine="elsewhere", beat=time.time() - 90, beat_seconds=30)
    assert await is_alive(store, "them")


@pytest.mark.virtual_time
async def test_dead_run_of_another_machine_is_waited_for(store, monkeypatch):
    began = time.time()
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(owners.time, "time", lambda: began + loop.time())
    await write_heartbeat(store, machine="elsewhere")
    assert await wait_for_dead(store, "them")
    assert loop.time() >= 60


@pytest.mark.virtual_time
async def test_living_run_of_another_machine_is_known_by_its_next_beat(store):
    await write_heartbeat(store, machine="elsewhere")
    waiting = asyncio.create_task(wait_for_dead(store, "them"))
    await asyncio.sleep(10)
    assert not waiting.done()
    await write_heartbeat(store, machine="elsewhere", beat=time.time() + 1)
    assert not await waiting


async def test_living_run_of_this_machine_is_not_waited_for(store):
    await write_heartbeat(store)
    assert not await wait_for_dead(store, "them")
    assert await wait_for_dead(store, "nobody")


async def test_frozen_run_is_overdue(store, monkeypatch):
    async with keep_heartbeat(store) as heartbeat:
        assert not heartbeat.is_overdue
        now = time.time()
        monkeypatch.setattr(owners.time, "time", lambda: now + 61)
        assert heartbeat.is_overdue
        await heartbeat.beat(store)
        assert not heartbeat.is_overdue


async def test_outage_does_not_read_as_death(store, faulty):
    await write_heartbeat(store)
    faulty(store, {"cat_file"}, TimeoutError("slow"))
    with pytest.raises(LedgerError):
        await is_alive(store, "them")


async def test_heartbeat_continues_after_an_outage(store, monkeypatch):
    async with keep_heartbeat(store, beat_seconds=0.001) as heartbeat:
        owner = heartbeat.owner
        first = await store.read(f"owners/{owner}.json")
        monkeypatch.setattr("prefect_flux_kontext.ledger.store.replace_file", _refuse(3))
        while await store.read(f"owners/{owner}.json") == first:
            pass


def _refuse(times):
    left = [4 * times]

    def replace(fs, path, data):
        if left[0]:
            left[0] -= 1
            raise OSError(5, "no")
        replace_file(fs, path, data)

    return replace


@pytest.fixture
async def claimed(store):
    """A row that another run has claimed, and this run's ledger."""
    await write_heartbeat(store)
    theirs, ours = Ledger(store, "them", PRICES), Ledger(store, "us", PRICES)
    row = make_row(2, {"id": "a", "prompt": "a lighthouse"})
    return theirs, ours, row, await theirs.claim(row, await theirs.read("k" * 32))


async def test_intent_of_a_dead_owner_is_unknown(claimed, store):
    _, ours, _, entry = claimed
    await store.remove("owners/them.json")
    assert await ours.wait_until_settled(entry) == (entry, True)


async def test_own_intent_is_unknown_without_waiting(claimed):
    theirs, _, _, entry = claimed
    assert await theirs.wait_until_settled(entry) == (entry, False)


@pytest.mark.virtual_time
async def test_living_owner_is_waited_for(claimed):
    theirs, ours, _, entry = claimed
    waiting = asyncio.create_task(ours.wait_until_settled(entry))
    await asyncio.sleep(30)
    assert not waiting.done()
    await theirs.record_accepted(entry, "task_1")
    settled, _ = await waiting
    assert settled.state is State.ACCEPTED


@pytest.mark.virtual_time
async def test_wait_for_a_silent_owner_ends(claimed):
    """Otherwise two runs that each lost a reply would wait for each other."""
    _, ours, _, entry = claimed
    assert await ours.wait_until_settled(entry) == (entry, False)


async def test_last_record_of_a_dying_owner_is_read(claimed, store, monkeypatch):
    """It records the outcome and ends between the liveness check and the read of the row."""
    theirs, ours, _, entry = claimed

    async def ends(_store, _owner):
        await theirs.record_accepted(entry, "task_1")
        await store.remove("owners/them.json")
        return False

    monkeypatch.setattr("prefect_flux_kontext.ledger.ledger.is_alive", ends)
    settled, _ = await ours.wait_until_settled(entry)
    assert settled.state is State.ACCEPTED


async def test_dead_owner_does_not_affect_the_next_attempt(claimed, store):
    """Two runs pay again for an unknown row; the slower must not give up the other's attempt."""
    _, ours, row, entry = claimed
    await store.remove("owners/them.json")
    async with keep_heartbeat(store) as quicker:
        ledger = Ledger(store, quicker.owner, PRICES)
        rejected = await ledger.record_rejected(entry, _given_up(), by="person")
        again = await ledger.claim(row, rejected)
        await ledger.record_accepted(again, "task_2")
    settled, gone = await ours.wait_until_settled(entry)
    assert (settled.state, settled.attempt, gone) == (State.ACCEPTED, 2, False)


def _given_up():
    return FluxKontextError("again", code="resubmitted")
