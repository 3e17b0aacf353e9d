"""The index of stored rows finds whole records by row key."""

import pytest

from prefect_flux_kontext.batch.index import LedgerIndex
from prefect_flux_kontext.ledger.records import Ended
from prefect_flux_kontext.ledger.store import RecordStore
from prefect_flux_kontext.ledger.waves import FinishedRow
from prefect_flux_kontext.models import StoredImage
from prefect_flux_kontext.storage.filesystem import OutputFolder

pytestmark = pytest.mark.anyio


def finished(number, state="stored"):
    image = StoredImage(
        uri=f"memory://out/{number}.jpg",
        task_id="task_1",
        format="jpeg",
        size=1,
        sha256="0" * 64,
        width=2,
        height=3,
    )
    ended = Ended(state=state, task_id="task_1", files=["a.jpg"], images=[image])
    key = f"{number:032x}"
    return FinishedRow(key=key, row_id="a", attempt=1, spent=0.03, failures=0, ended=ended)


async def test_stored_rows_finds_only_stored_records():
    store = RecordStore("memory://stored-rows")
    rows = [finished(number, "failed" if number % 7 == 3 else "stored") for number in range(2_500)]
    lines = "".join(f"{row.model_dump_json()}\n" for row in rows)
    await store.replace("waves/one.jsonl", lines.encode())
    with LedgerIndex() as index:
        output = OutputFolder("memory://stored-rows")
        assert await index.find_stored([rows[0].key], output) == {}
        await index.read_finished(store)
        wanted = [row.key for row in rows[:20]] + [rows[-1].key, "f" * 32]
        found = await index.find_stored(wanted, output)
    assert found == {row.key: row for row in [*rows[:20], rows[-1]] if row.ended.state == "stored"}


async def test_old_record_without_times_is_read():
    record = (
        '{"state": "stored", "task_id": "t", "files": ["a.jpg"], "at": "2026-01-01T00:00:00Z"}'
    )
    ended = Ended.model_validate_json(record)
    assert (ended.submitted_at, ended.waiting_seconds) == (None, None)
