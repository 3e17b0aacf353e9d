import asyncio

import pytest

from prefect_flux_kontext.callbacks.inbox import Callback, Inbox
from prefect_flux_kontext.callbacks.session import InboxWatcher
from prefect_flux_kontext.errors import LedgerError
from prefect_flux_kontext.ledger.store import RecordStore
from tests.support.s3 import s3_server

pytestmark = pytest.mark.anyio

OWNER = "0123456789abcdef"


def callback(number, owner=OWNER, task_id=None):
    return Callback(owner=owner, key=f"{number:032x}", number=1, task_id=task_id or f"t{number}")


async def read_all(inbox, owner=OWNER):
    names = await inbox.list_names(owner)
    return [callback for name in names for callback in await inbox.read(owner, name)]


async def test_stored_callback_is_read_by_another_process(tmp_path):
    await Inbox(RecordStore(str(tmp_path))).keep(callback(1))
    assert await read_all(Inbox(RecordStore(str(tmp_path)))) == [callback(1)]


async def test_concurrent_callbacks_share_a_file(tmp_path):
    inbox = Inbox(RecordStore(str(tmp_path)))
    await asyncio.gather(*(inbox.keep(callback(n)) for n in range(100)))
    assert len(await inbox.list_names(OWNER)) <= 2
    assert sorted(stored.key for stored in await read_all(inbox)) == [
        callback(n).key for n in range(100)
    ]


async def test_inbox_works_on_s3():
    with s3_server() as (bucket, _):
        inbox = Inbox(RecordStore(f"{bucket}/inbox"))
        await asyncio.gather(*(inbox.keep(callback(n)) for n in range(10)))
        assert len(await read_all(inbox)) == 10
        for name in await inbox.list_names(OWNER):
            await inbox.remove(OWNER, name)
        assert await inbox.list_names(OWNER) == []


@pytest.mark.virtual_time
async def test_callback_that_cannot_be_written_raises(tmp_path):
    (tmp_path / OWNER).write_text("a file where the folder should be")
    inbox = Inbox(RecordStore(str(tmp_path)))
    results = await asyncio.gather(
        *(inbox.keep(callback(n)) for n in range(3)), return_exceptions=True
    )
    assert [type(error) for error in results] == [LedgerError] * 3
    (tmp_path / OWNER).unlink()
    await inbox.keep(callback(4))
    assert await read_all(inbox) == [callback(4)]


async def test_cancelled_writer_does_not_affect_others(tmp_path):
    inbox = Inbox(RecordStore(str(tmp_path)))
    waiting = [asyncio.create_task(inbox.keep(callback(n))) for n in range(3)]
    await asyncio.sleep(0)
    waiting[1].cancel()
    await asyncio.wait(waiting)
    assert waiting[0].result() is waiting[2].result() is None
    assert callback(0) in await read_all(inbox)


@pytest.mark.virtual_time
async def test_damaged_file_is_logged_once_and_skipped(tmp_path, caplog):
    inbox = Inbox(RecordStore(str(tmp_path)))
    await inbox.keep(callback(1))
    (tmp_path / OWNER / "0.jsonl").write_bytes(b"{")
    watcher = InboxWatcher(inbox, OWNER)
    row = watcher.expect(callback(1).attempt)
    watching = asyncio.create_task(watcher.watch())
    await asyncio.sleep(10)
    watching.cancel()
    assert row.task_ids == {"t1"}
    assert caplog.text.count("0.jsonl is damaged") == 1


@pytest.mark.virtual_time
async def test_files_are_removed_when_their_rows_have_ended(tmp_path):
    inbox = Inbox(RecordStore(str(tmp_path)))
    watcher = InboxWatcher(inbox, OWNER)
    for number in (1, 2):
        watcher.expect(callback(number).attempt)
    await asyncio.gather(*(inbox.keep(callback(number)) for number in (1, 1, 2, 3)))
    watching = asyncio.create_task(watcher.watch())
    await asyncio.sleep(10)
    watcher.record_end(callback(1).attempt)
    await asyncio.sleep(10)
    assert await read_all(inbox) != []
    watcher.record_end(callback(2).attempt)
    await asyncio.sleep(10)
    watching.cancel()
    assert await read_all(inbox) == []
