"""Unknown rows are settled by their callbacks and never paid twice."""

import asyncio
import logging

import httpx
import pytest

from prefect_flux_kontext.batch.status import read_ledger_status
from prefect_flux_kontext.ledger.ledger import Ledger
from prefect_flux_kontext.ledger.records import State
from prefect_flux_kontext.ledger.store import open_ledger_store
from prefect_flux_kontext.storage.filesystem import OutputFolder
from tests.callbacks.called_batch import KEY, PUBLIC, CalledBatch, later, lost, manifest, punctual

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

ROWS = 20


def every_fourth(number):
    return number % 4 == 0


def ledger_of(batch):
    return Ledger(open_ledger_store(OutputFolder(batch.url)), owner="test", prices={})


async def test_unknown_rows_are_settled_in_the_same_run(monkeypatch):
    batch = CalledBatch(monkeypatch, lose=every_fourth)
    summary = await batch.run(ROWS)
    assert (summary.stored, summary.unknown) == (ROWS, 0)
    assert batch.service.bill()["accepted"] == ROWS
    assert summary.spent == pytest.approx(0.03 * ROWS)
    entries = [await ledger_of(batch).read(row.key) for row in manifest(ROWS)]
    assert sum(entry.posted.by == "callback" for entry in entries) == 5
    assert await batch.inbox() == []


async def test_rows_without_callback_are_unknown_after_the_grace(monkeypatch):
    batch = CalledBatch(monkeypatch, lost, lose=every_fourth)
    summary = await batch.run(ROWS)
    assert (summary.stored, summary.unknown) == (ROWS - 5, 5)
    assert batch.service.bill()["accepted"] == ROWS
    assert 300 <= summary.seconds < 330
    again = await batch.run(ROWS)
    assert (again.stored, again.unknown, again.spent) == (ROWS - 5, 5, 0)
    assert batch.service.bill()["accepted"] == ROWS


async def test_rows_waiting_for_a_callback_delay_no_others(monkeypatch):
    async def silent_on_lost_replies(post, url, envelope):
        if envelope["data"]["taskId"] not in batch.lost_tasks:
            await post(url, envelope)

    # One wave of four rows at a time, and each has a row without a callback.
    monkeypatch.setattr("prefect_flux_kontext.batch.waves.WAVE_ROWS", 4)
    monkeypatch.setattr("prefect_flux_kontext.batch.waves.math.ceil", lambda _waves: -1)
    batch = CalledBatch(monkeypatch, silent_on_lost_replies, lose=every_fourth)
    summary = await batch.run(ROWS)
    assert (summary.stored, summary.unknown) == (ROWS - 5, 5)
    assert summary.seconds < 5 * 50 + 300


async def test_callback_after_the_run_settles_in_the_next(monkeypatch):
    async def long_after(post, url, envelope):
        calls.append(asyncio.ensure_future(later(post, url, envelope, 1_000)))

    calls = []
    batch = CalledBatch(monkeypatch, long_after, lose=every_fourth)
    summary = await batch.run(ROWS)
    assert summary.unknown == 5
    await asyncio.gather(*calls)
    assert len(await batch.inbox()) > 0
    collected = await batch.run(only_collect=True, url=None)
    assert (collected.stored, collected.unknown) == (5, 0)
    assert batch.service.bill()["accepted"] == ROWS
    assert await batch.inbox() == []
    status = await read_ledger_status(open_ledger_store(OutputFolder(batch.url)))
    assert status.states == {State.STORED: ROWS}


async def test_callback_before_the_submit_reply_counts(monkeypatch, caplog):
    batch = CalledBatch(monkeypatch)
    handle = batch.handle_async_request

    async def slow_reply(request):
        response = await handle(request)
        if "generateTask" in request.url.path:
            await asyncio.sleep(55)
        return response

    monkeypatch.setattr(batch, "handle_async_request", slow_reply)
    with caplog.at_level(logging.WARNING):
        summary = await batch.run(8)
    assert summary.stored == batch.service.bill()["accepted"] == 8
    assert summary.seconds < 60
    assert batch.service.bill()["status_requests"] == 8
    assert caplog.text == ""


async def test_resubmit_waits_for_the_callback_first(monkeypatch):
    async def late(post, url, envelope):
        calls.append(asyncio.ensure_future(later(post, url, envelope, 400)))

    calls = []
    batch = CalledBatch(monkeypatch, late, lose=lambda number: number == 1)
    first = await batch.run(1, grace=10)
    assert first.unknown == 1
    # The intent's age comes from the wall clock, which stands still here: 600 s are left.
    second = await batch.run(1, grace=600, resubmit=True)
    await asyncio.gather(*calls)
    assert (second.stored, batch.service.bill()["accepted"]) == (1, 1)


async def test_resubmit_pays_again_without_a_callback(monkeypatch):
    batch = CalledBatch(monkeypatch, lost, lose=lambda number: number == 1)
    await batch.run(1, grace=10)
    second = await batch.run(1, grace=10, resubmit=True)
    assert (second.stored, batch.service.bill()["accepted"]) == (1, 2)


async def test_task_of_another_row_is_not_taken(monkeypatch, caplog):
    async def as_another(post, url, envelope):
        data = envelope["data"]
        task_ids = [record["taskId"] for record in batch.service.records()]
        other = next(name for name in task_ids if name not in batch.lost_tasks)
        await post(url, {**envelope, "data": {**data, "taskId": other}})

    batch = CalledBatch(monkeypatch, as_another, lose=every_fourth)
    summary = await batch.run(ROWS)
    assert (summary.stored, summary.unknown) == (ROWS - 5, 5)
    assert "of another row" in caplog.text
    entries = [await ledger_of(batch).read(row.key) for row in manifest(ROWS)]
    named = [entry.posted.task_id for entry in entries if entry.posted]
    assert len(set(named)) == len(named) == ROWS - 5


async def test_task_of_an_earlier_run_is_not_taken(monkeypatch, caplog):
    """The record of a stored row, not this run's memory, says that the task is taken."""
    batch = CalledBatch(monkeypatch)
    await batch.run(1)
    [stored] = [record["taskId"] for record in batch.service.records()]

    async def as_stored(post, url, envelope):
        await post(url, {**envelope, "data": {**envelope["data"], "taskId": stored}})

    batch.deliver_callback, batch.lose = as_stored, lambda _number: True
    summary = await batch.run(2)
    assert (summary.stored, summary.unknown) == (1, 1)
    assert f"task {stored} of another row" in caplog.text


async def test_task_unknown_to_the_service_is_not_taken(monkeypatch, caplog):
    async def made_up(post, url, envelope):
        await post(url, {**envelope, "data": {"taskId": "task_made_up", "state": "success"}})

    summary = await CalledBatch(monkeypatch, made_up, lose=every_fourth).run(ROWS)
    assert (summary.stored, summary.unknown) == (ROWS - 5, 5)
    assert "names task task_made_up, which cannot be confirmed" in caplog.text


async def test_true_task_is_taken_after_a_made_up_one(monkeypatch):
    async def first_made_up(post, url, envelope):
        await post(url, {**envelope, "data": {"taskId": "task_made_up", "state": "success"}})
        await later(post, url, envelope, 60)

    summary = await CalledBatch(monkeypatch, first_made_up, lose=every_fourth).run(ROWS)
    assert (summary.stored, summary.unknown) == (ROWS, 0)


async def test_two_tasks_for_one_row_leave_it_unknown(monkeypatch, caplog):
    async def two(post, url, envelope):
        spare = batch.spare
        await post(url, {**envelope, "data": {**envelope["data"], "taskId": spare}})
        await post(url, envelope)

    batch = CalledBatch(monkeypatch, two, lose=lambda number: number == 1)
    submitted = batch.service.submit(
        KEY, {"input": {"mode": "pro", "prompt": "not of the batch"}}, PUBLIC
    )
    batch.spare = submitted.task_id
    summary = await batch.run(1)
    assert summary.unknown == 1
    assert "name 2 tasks" in caplog.text


async def test_failing_status_requests_are_repeated(monkeypatch):
    batch = CalledBatch(monkeypatch, punctual, lose=lambda number: number == 1)
    handle = batch.handle_async_request
    failures = iter([503, 503, 503])

    async def unreliable(request):
        if "statusTask" in request.url.path and (status := next(failures, None)):
            return httpx.Response(status)
        return await handle(request)

    monkeypatch.setattr(batch, "handle_async_request", unreliable)
    assert (await batch.run(1)).stored == 1


async def test_secret_and_tokens_are_never_recorded(monkeypatch, caplog):
    with caplog.at_level(logging.DEBUG):
        batch = CalledBatch(monkeypatch, lost, lose=every_fourth)
        await batch.run(ROWS)
    store = open_ledger_store(OutputFolder(batch.url))
    files = store._fs.find(store._root)
    recorded = b"".join(store._fs.cat_file(name) for name in files) + caplog.text.encode()
    macs = [url.rpartition(".")[2].encode() for url in batch.urls]
    assert len(files) > ROWS
    assert not [mac for mac in macs if mac in recorded]
    assert b"a-secret-of-the-tests" not in recorded
