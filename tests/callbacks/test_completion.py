"""When all that an output is owed was called back: once, later again, never while a run lives."""

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
    """An output with its ledger and inbox, and what was told of it.

    Attributes:
        told: The row numbers of each call of `ready`, with the seconds since the beginning.
        waiting: What `ready` answers: whether anybody waits.
        trouble: How often `ready` fails first.
    """

    def __init__(self, folder):
        self.store = open_ledger_store(OutputFolder(str(folder)))
        self.inbox = Inbox(self.store.below("callbacks"))
        self.told = []
        self.waiting = True
        self.trouble = 0
        self.attempts = {}

    async def pay(self, owner, *numbers, accepted=True):
        """Rows as a run that has ended leaves them: accepted, or with their reply lost."""
        ledger = Ledger(self.store, owner, FluxKontextSettings().prices())
        keys = []
        for number in numbers:
            row = make_row(number, {"id": f"r{number}", "prompt": f"row {number}"})
            entry = await ledger.claim(row, Entry(key=row.key))
            if accepted:
                await ledger.accepted(entry, f"task_{number}")
            keys.append(row.key)
            self.attempts[number] = Attempt(owner, row.key, entry.attempt)
        wave = OpenWave(name=f"{owner}-{numbers[0]}", owner=owner, keys=keys)
        await open_wave(self.store, wave)

    async def end(self, number):
        ledger = Ledger(self.store, "3" * 16, FluxKontextSettings().prices())
        entry = await ledger.read(self.attempts[number].key)
        await ledger.failed(entry, FluxKontextError("It failed.", code="FAILED"))

    async def call(self, *numbers):
        for number in numbers:
            owner, key, attempt = self.attempts[number]
            await self.inbox.keep(Callback(owner=owner, key=key, number=attempt))

    async def ready(self, rows):
        if self.trouble:
            self.trouble -= 1
            raise FluxKontextError("Prefect is away")
        numbers = {attempt: number for number, attempt in self.attempts.items()}
        self.told.append(sorted(numbers[attempt] for attempt in rows))
        return self.waiting

    @asynccontextmanager
    async def watched(self):
        awaited = CompletionMonitor(self.store, self.inbox, self.ready)
        self.inbox.on_kept = awaited.kept
        watching = asyncio.create_task(awaited.watch())
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.wait({watching})


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


async def test_all_rows_are_told_of_together_and_once(place):
    await place.pay(FIRST, 1, 2, 3)
    async with place.watched():
        await place.call(1, 2)
        await asyncio.sleep(3_600)
        assert place.told == []
        await place.call(3)
        await asyncio.sleep(3_600)
    assert place.told == [[1, 2, 3]]


async def test_a_later_batch_is_told_of_again(place):
    await place.pay(FIRST, 1)
    async with place.watched():
        await place.call(1)
        await asyncio.sleep(60)
        await place.end(1)
        await place.pay(SECOND, 2, 3)
        await place.call(3)
        await asyncio.sleep(60)
        assert place.told == [[1]]
        await place.call(2)
        await asyncio.sleep(60)
    assert place.told == [[1], [2, 3]]


async def test_what_came_before_the_receiver_started_counts(place):
    await place.pay(FIRST, 1, 2)
    await place.call(1, 2)
    async with place.watched():
        await asyncio.sleep(60)
    assert place.told == [[1, 2]]


async def test_where_nothing_is_owed_nothing_is_told(place):
    await place.pay(FIRST, 1)
    await place.call(1)
    await place.end(1)
    async with place.watched():
        await asyncio.sleep(60)
    assert place.told == []


async def test_a_row_whose_reply_was_lost_holds_nothing_up(place):
    await place.pay(FIRST, 1)
    await place.pay(FIRST, 2, accepted=False)
    async with place.watched():
        await place.call(1)
        await asyncio.sleep(60)
    assert place.told == [[1]]


async def test_another_attempt_of_a_row_is_not_the_one_that_is_owed(place):
    await place.pay(FIRST, 1)
    async with place.watched():
        owner, key, _ = place.attempts[1]
        await place.inbox.keep(Callback(owner=owner, key=key, number=2))
        await place.inbox.keep(Callback(owner=SECOND, key=key, number=1))
        await asyncio.sleep(60)
    assert place.told == []


async def test_nobody_is_told_while_a_run_lives_nor_any_row_read(place, monkeypatch):
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
            assert place.told == read == []
        await asyncio.sleep(60)
    assert place.told == [[1]]
    assert len(read) == 1


async def test_while_callbacks_come_the_ledger_is_left_alone(place, monkeypatch):
    await place.pay(FIRST, *range(1, 31))
    looks = []
    plain = CompletionMonitor.all_come

    async def counted(awaited):
        looks.append(1)
        return await plain(awaited)

    monkeypatch.setattr(CompletionMonitor, "all_come", counted)
    async with place.watched():
        for number in range(1, 31):
            await place.call(number)
            await asyncio.sleep(4)
        assert looks == []
        await asyncio.sleep(60)
    assert looks == [1]
    assert place.told == [list(range(1, 31))]


async def test_who_is_not_yet_suspended_is_looked_for_again_but_not_for_ever(place):
    await place.pay(FIRST, 1)
    place.waiting = False
    async with place.watched():
        await place.call(1)
        await asyncio.sleep(3_600)
    assert place.told == [[1]] * 4


async def test_what_could_not_be_told_is_told_later(place, caplog):
    await place.pay(FIRST, 1)
    place.trouble = 10
    async with place.watched():
        await place.call(1)
        with caplog.at_level(logging.WARNING):
            await asyncio.sleep(3_600)
    assert place.told == [[1]]
    assert caplog.text.count("Prefect is away") == 10


async def test_a_damaged_record_of_callbacks_is_named_and_waited_for(place, caplog):
    await place.pay(FIRST, 1)
    await place.call(1)
    await place.inbox._store.create(f"{FIRST}/damaged.jsonl", b"{")
    async with place.watched():
        await asyncio.sleep(60)
        assert place.told == []
        assert "damaged.jsonl is damaged. Remove it" in caplog.text
        await place.inbox.remove(FIRST, "damaged.jsonl")
        await asyncio.sleep(120)
    assert place.told == [[1]]


async def test_each_record_of_callbacks_is_read_once(place, monkeypatch):
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
    assert place.told == [[1, 2]]
    assert len(read) == len(set(read)) == 2
