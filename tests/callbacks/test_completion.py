"""`CompletionMonitor`: when it calls `ready`, and what it reads."""

import asyncio
import logging
from contextlib import asynccontextmanager

import pytest

from prefect_flux_kontext.callbacks.completion import CompletionMonitor
from prefect_flux_kontext.callbacks.inbox import Callback, Inbox
from prefect_flux_kontext.callbacks.tokens import Attempt
from prefect_flux_kontext.errors import FluxKontextError
from prefect_flux_kontext.ledger.heartbeat import keep_heartbeat
from prefect_flux_kontext.ledger.ledger import Ledger
from prefect_flux_kontext.ledger.records import Entry
from prefect_flux_kontext.ledger.store import open_ledger_store
from prefect_flux_kontext.ledger.waves import OpenWave, open_wave
from prefect_flux_kontext.manifest.row import make_row
from prefect_flux_kontext.settings import FluxKontextSettings
from prefect_flux_kontext.storage.filesystem import OutputFolder

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

FIRST, SECOND = "1" * 16, "2" * 16


class Place:
    """An output with its ledger and inbox, and the calls of `ready`.

    Attributes:
        calls: The row numbers of each call of `ready`.
        waiting: What `ready` returns: whether anything waits.
        failures: How often `ready` fails first.
    """

    def __init__(self, folder):
        self.store = open_ledger_store(OutputFolder(str(folder)))
        self.inbox = Inbox(self.store.below("callbacks"))
        self.calls = []
        self.waiting = True
        self.failures = 0
        self.attempts = {}

    async def pay(self, owner, *numbers, accepted=True):
        """Leave rows as an ended run does: accepted, or with their submit's reply lost."""
        ledger = Ledger(self.store, owner, FluxKontextSettings().prices())
        keys = []
        for number in numbers:
            row = make_row(number, {"id": f"r{number}", "prompt": f"row {number}"})
            entry = await ledger.claim(row, Entry(key=row.key))
            if accepted:
                await ledger.record_accepted(entry, f"task_{number}")
            keys.append(row.key)
            self.attempts[number] = Attempt(owner, row.key, entry.attempt)
        wave = OpenWave(name=f"{owner}-{numbers[0]}", owner=owner, keys=keys)
        await open_wave(self.store, wave)

    async def end(self, number):
        ledger = Ledger(self.store, "3" * 16, FluxKontextSettings().prices())
        entry = await ledger.read(self.attempts[number].key)
        await ledger.record_failed(entry, FluxKontextError("It failed.", code="FAILED"))

    async def call(self, *numbers):
        for number in numbers:
            owner, key, attempt = self.attempts[number]
            await self.inbox.keep(Callback(owner=owner, key=key, number=attempt))

    async def ready(self, rows):
        if self.failures:
            self.failures -= 1
            raise FluxKontextError("Prefect is away")
        numbers = {attempt: number for number, attempt in self.attempts.items()}
        self.calls.append(sorted(numbers[attempt] for attempt in rows))
        return self.waiting

    @asynccontextmanager
    async def watched(self):
        monitor = CompletionMonitor(self.store, self.inbox, self.ready)
        self.inbox.on_kept = monitor.kept
        watching = asyncio.create_task(monitor.watch())
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.wait({watching})


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


async def test_ready_is_called_once_for_all_rows(place):
    await place.pay(FIRST, 1, 2, 3)
    async with place.watched():
        await place.call(1, 2)
        await asyncio.sleep(3_600)
        assert place.calls == []
        await place.call(3)
        await asyncio.sleep(3_600)
    assert place.calls == [[1, 2, 3]]


async def test_ready_is_called_again_for_a_later_batch(place):
    await place.pay(FIRST, 1)
    async with place.watched():
        await place.call(1)
        await asyncio.sleep(60)
        await place.end(1)
        await place.pay(SECOND, 2, 3)
        await place.call(3)
        await asyncio.sleep(60)
        assert place.calls == [[1]]
        await place.call(2)
        await asyncio.sleep(60)
    assert place.calls == [[1], [2, 3]]


async def test_callbacks_before_the_start_count(place):
    await place.pay(FIRST, 1, 2)
    await place.call(1, 2)
    async with place.watched():
        await asyncio.sleep(60)
    assert place.calls == [[1, 2]]


async def test_ready_is_not_called_without_outstanding_rows(place):
    await place.pay(FIRST, 1)
    await place.call(1)
    await place.end(1)
    async with place.watched():
        await asyncio.sleep(60)
    assert place.calls == []


async def test_unknown_rows_do_not_delay_ready(place):
    await place.pay(FIRST, 1)
    await place.pay(FIRST, 2, accepted=False)
    async with place.watched():
        await place.call(1)
        await asyncio.sleep(60)
    assert place.calls == [[1]]


async def test_callbacks_of_other_attempts_do_not_count(place):
    await place.pay(FIRST, 1)
    async with place.watched():
        owner, key, _ = place.attempts[1]
        await place.inbox.keep(Callback(owner=owner, key=key, number=2))
        await place.inbox.keep(Callback(owner=SECOND, key=key, number=1))
        await asyncio.sleep(60)
    assert place.calls == []


async def test_no_row_is_read_while_a_run_is_active(place, monkeypatch):
    await place.pay(FIRST, 1)
    read = []
    plain = Ledger.read

    async def counted(ledger, key):
        read.append(key)
        return await plain(ledger, key)

    monkeypatch.setattr(Ledger, "read", counted)
    async with place.watched():
        async with keep_heartbeat(place.store):
            await place.call(1)
            await asyncio.sleep(600)
            assert place.calls == read == []
        await asyncio.sleep(60)
    assert place.calls == [[1]]
    assert len(read) == 1


async def test_no_check_while_callbacks_arrive(place, monkeypatch):
    await place.pay(FIRST, *range(1, 31))
    checks = []
    plain = CompletionMonitor.find_called_back

    async def counted(monitor):
        checks.append(1)
        return await plain(monitor)

    monkeypatch.setattr(CompletionMonitor, "find_called_back", counted)
    async with place.watched():
        for number in range(1, 31):
            await place.call(number)
            await asyncio.sleep(4)
        assert checks == []
        await asyncio.sleep(60)
    assert checks == [1]
    assert place.calls == [list(range(1, 31))]


async def test_ready_is_called_four_times_if_nothing_waits(place):
    await place.pay(FIRST, 1)
    place.waiting = False
    async with place.watched():
        await place.call(1)
        await asyncio.sleep(3_600)
    assert place.calls == [[1]] * 4


async def test_failed_ready_is_repeated(place, caplog):
    await place.pay(FIRST, 1)
    place.failures = 10
    async with place.watched():
        await place.call(1)
        with caplog.at_level(logging.WARNING):
            await asyncio.sleep(3_600)
    assert place.calls == [[1]]
    assert caplog.text.count("Prefect is away") == 10


async def test_damaged_callback_file_is_named_and_rechecked(place, caplog):
    await place.pay(FIRST, 1)
    await place.call(1)
    await place.inbox._store.create(f"{FIRST}/damaged.jsonl", b"{")
    async with place.watched():
        await asyncio.sleep(60)
        assert place.calls == []
        assert "damaged.jsonl is damaged. Remove it" in caplog.text
        await place.inbox.remove(FIRST, "damaged.jsonl")
        await asyncio.sleep(120)
    assert place.calls == [[1]]


async def test_each_callback_file_is_read_once(place, monkeypatch):
    await place.pay(FIRST, 1, 2)
    await place.call(1)
    read = []
    plain = Inbox.read

    async def counted(inbox, owner, name):
        read.append(name)
        return await plain(inbox, owner, name)

    monkeypatch.setattr(Inbox, "read", counted)
    async with place.watched():
        await asyncio.sleep(60)
        await place.call(2)
        await asyncio.sleep(60)
    assert place.calls == [[1, 2]]
    assert len(read) == len(set(read)) == 2
