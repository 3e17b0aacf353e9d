"""Faults of callbacks: none of them changes the result of a batch."""

import asyncio
import logging
import random

import pytest

from tests.callbacks.called_batch import PUBLIC, CalledBatch, later, lost, punctual

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

ROWS = 20


async def doubled(post, url, envelope):
    for _ in range(4):
        await post(url, envelope)


async def late_by_minutes(post, url, envelope):
    await later(post, url, envelope, 240)


async def out_of_order(post, url, envelope):
    await later(post, url, envelope, random.Random(url).uniform(0, 120))


async def half_lost(post, url, envelope):
    if random.Random(url).random() < 0.5:
        await post(url, envelope)


async def with_a_forged_token(post, url, envelope):
    changed = "A" if url[-5] != "A" else "B"
    await post(url[:-5] + changed + url[-4:], envelope)


async def for_another_row(post, url, envelope):
    """The token's MAC with another row's name before it."""
    owner, key, number, mac = url.rpartition("/")[2].split(".")
    await post(f"{PUBLIC}/{owner}.{key[::-1]}.{number}.{mac}", envelope)


async def for_an_attempt_that_is_not_ours(post, url, envelope):
    owner, key, number, mac = url.rpartition("/")[2].split(".")
    await post(f"{PUBLIC}/{owner}.{key}.{int(number) + 1}.{mac}", envelope)


async def replayed_for_minutes(post, url, envelope):
    for _ in range(30):
        await later(post, url, envelope, 10)


async def huge(post, url, envelope):
    await post(url, {**envelope, "padding": "x" * 10_000_000})


async def unreadable(post, url, _envelope):
    await post(url, b'{"code": 200, "data": ')


async def nested(post, url, _envelope):
    await post(url, b"[" * 60_000)


FAULTS = {
    punctual: 50,
    doubled: 50,
    half_lost: 70,
    out_of_order: 70,
    lost: 70,
    late_by_minutes: 70,
    with_a_forged_token: 70,
    for_another_row: 70,
    for_an_attempt_that_is_not_ours: 70,
    replayed_for_minutes: 70,
    huge: 70,
    unreadable: 50,
    nested: 50,
}
"""Seconds that the batch takes at most. Generation takes 17 to 44 s, a sweep 60 s."""


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
async def test_batch_result_does_not_depend_on_callbacks(fault, monkeypatch):
    batch = CalledBatch(monkeypatch, fault)
    summary = await batch.run(ROWS)
    assert (summary.stored, summary.unknown, summary.rows) == (ROWS, 0, ROWS)
    assert batch.service.bill()["accepted"] == ROWS
    assert summary.seconds < FAULTS[fault]
    # Each row needs one poll. A callback may be wrong, and a sweep may be too early.
    assert batch.service.bill()["status_requests"] <= 2 * ROWS


async def test_callbacks_need_one_status_request_per_image(monkeypatch):
    batch = CalledBatch(monkeypatch)
    await batch.run(ROWS)
    assert batch.service.bill()["status_requests"] == ROWS
    assert len(set(batch.urls)) == ROWS


async def test_rows_are_polled_while_callbacks_are_missing(monkeypatch, caplog):
    is_up = False

    async def sometimes(post, url, envelope):
        if is_up:
            await post(url, envelope)

    batch = CalledBatch(monkeypatch, sometimes, slots=5)
    with caplog.at_level(logging.WARNING):
        run = asyncio.create_task(batch.run(60))
        await asyncio.sleep(240)
        assert caplog.text.count("Rows end without a callback") == 1
        # Five rows at a time: a sweep of 60 s would have done only 20 by now.
        assert batch.service.bill()["accepted"] > 25
        is_up = True
        assert (await run).stored == 60
    assert caplog.text.count("Callbacks arrive again") == 1


async def test_premature_callbacks_change_nothing(monkeypatch):
    batch = CalledBatch(monkeypatch, lost)
    submit = batch.service.submit

    def submit_and_call(key, body, base_url):
        task = submit(key, body, base_url)
        body_of_callback = {"code": 200, "data": {"taskId": task.task_id, "state": "success"}}
        early.append(
            asyncio.ensure_future(later(batch.post, body["callback_url"], body_of_callback, 1))
        )
        return task

    early = []
    monkeypatch.setattr(batch.service, "submit", submit_and_call)
    summary = await batch.run(ROWS)
    await asyncio.gather(*early)
    assert summary.stored == batch.service.bill()["accepted"] == ROWS
    assert summary.seconds < 70


async def test_wrong_task_id_is_logged_and_changes_nothing(monkeypatch, caplog):
    tasks = []

    async def mixed_up(post, url, envelope):
        data = envelope["data"]
        tasks.append(data["taskId"])
        await post(url, {**envelope, "data": {**data, "taskId": tasks[0]}})

    batch = CalledBatch(monkeypatch, mixed_up)
    summary = await batch.run(ROWS)
    assert summary.stored == batch.service.bill()["accepted"] == ROWS
    assert f"its callbacks also name {tasks[0]}." in caplog.text


async def test_forged_callbacks_get_the_same_answer(monkeypatch):
    replies = []

    async def both(post, url, envelope):
        forged = url[:-6] + url[-6:].swapcase()
        for target in (url, forged, f"{PUBLIC}/anything", PUBLIC):
            reply = await post(target, envelope)
            replies.append((reply.status_code, reply.content, sorted(reply.headers.items())))

    batch = CalledBatch(monkeypatch, both)
    await batch.run(2)
    assert len(replies) == 8
    assert all(reply == (200, b"", [("content-length", "0")]) for reply in replies)


async def test_inbox_is_empty_when_all_rows_are_stored(monkeypatch):
    batch = CalledBatch(monkeypatch)
    await batch.run(ROWS)
    assert await batch.inbox() == []
