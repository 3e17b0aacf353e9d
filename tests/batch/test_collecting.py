"""What killed and stopped runs have paid for is collected, told and counted, before it expires."""

import json
import logging
from datetime import timedelta

import pytest

from prefect_flux_kontext.batch import waves
from prefect_flux_kontext.errors import (
    BatchStoppedError,
    StorageError,
)
from prefect_flux_kontext.ledger.store import RecordStore
from prefect_flux_kontext.models import utc_now
from prefect_flux_kontext.storage.filesystem import OutputFolder
from tests.batch.story import LINES, SLOW, everything_kept, live, on
from tests.chaos.checker import read_all
from tests.chaos.simulation import in_process, manifest


def test_what_a_killed_run_has_paid_for_is_collected_without_the_manifest():
    async def main(world):
        assert await in_process(world, 20, manifest(LINES)) is None
        paid = world.posts
        summary = await in_process(world, None, [], only_collect=True)
        assert paid == world.posts
        assert (summary.stored, summary.not_submitted) == (paid, 0)
        await everything_kept(world, LINES, complete=False)
        summary = await in_process(world, None, manifest(LINES))
        assert (summary.stored, world.posts) == (10, 10)
        await everything_kept(world, LINES)

    live(main, settings=SLOW)


def test_the_result_manifest_learns_of_what_killed_runs_have_stored():
    async def main(world):
        # Killed when a row is stored whose wave has not ended.
        assert await in_process(world, 90, manifest(LINES)) is None
        await in_process(world, None, [], only_collect=True)
        files = read_all(world.url)
        lines = [json.loads(line) for line in files["results.jsonl"].splitlines()]
        stored = {line["id"] for line in lines if line["state"] == "stored"}
        assert stored == {name[:-4] for name in files if name.endswith(".jpg")}
        assert any(line["stored_before"] for line in lines)
        assert {line["source"] for line in lines} == {"manifest", "ledger"}
        await in_process(world, None, manifest(LINES))
        lines = list(map(json.loads, read_all(world.url)["results.jsonl"].splitlines()))
        assert [line["state"] for line in lines] == ["stored"] * 10
        assert {line["source"] for line in lines} == {"manifest"}

    live(main, settings=SLOW)


def test_a_row_that_many_killed_runs_have_left_is_collected_and_counted_once():
    async def main(world):
        for _ in range(4):
            assert await in_process(world, 5, manifest(LINES)) is None
        paid = world.posts
        summary = await in_process(world, None, [], only_collect=True)
        assert (summary.rows, summary.stored) == (paid, paid)

    live(main, settings=SLOW)


def test_a_stopped_run_leaves_what_earlier_runs_have_paid_for_to_be_collected():
    """It does not collect them itself, so it must not take them off the list either."""

    async def main(world):
        await in_process(world, 20, manifest(LINES[:5]))
        world.hook = on("submit", "no_balance")
        stopped = await in_process(world, None, manifest([("new", "new")]))
        assert isinstance(stopped, BatchStoppedError)
        world.hook = None
        await everything_kept(world, LINES, complete=False)
        summary = await in_process(world, None, [], only_collect=True)
        assert summary.stored == 5
        assert world.posts == 5

    live(main, settings=SLOW)


def test_a_collection_that_is_refused_takes_nothing_off_the_list():
    async def main(world):
        first = await in_process(world, None, manifest(LINES))
        assert first.outstanding == 10
        # More waves than are under way at once, so that some are not even begun.
        waves.WAVE_ROWS = 1  # the end of the simulation puts it back
        world.hook = on("status", "unauthorized")
        await in_process(world, None, [], only_collect=True)
        world.hook = None
        await everything_kept(world, LINES, complete=False)
        assert (await in_process(world, None, [], only_collect=True)).stored == 10

    live(main, hook=on("download", "download_trouble"))


@pytest.mark.parametrize(
    ("days", "told", "code"), [(5, False, None), (13, True, None), (16, True, "expired")]
)
def test_a_paid_result_near_its_end_is_told_and_a_lost_one_is_failed(caplog, days, told, code):
    async def main(world):
        await in_process(world, 30, manifest(LINES[:1]))
        files = read_all(world.url)
        [name] = [name for name in files if name.endswith("posted.json")]
        posted = json.loads(files[name])
        posted["at"] = (utc_now() - timedelta(days=days)).isoformat()
        await RecordStore(world.url).replace(name, json.dumps(posted).encode())
        if code:
            world.hook = on("download", "download_trouble")
        with caplog.at_level(logging.WARNING):
            summary = await in_process(world, None, [], only_collect=True)
        assert ("its result expires in" in caplog.text) is told
        assert summary.stored == (code is None)
        assert list(summary.reasons) == ([code] if code else [])

    live(main, settings=SLOW)


def test_an_output_that_refuses_an_old_result_does_not_make_it_expired(monkeypatch):
    async def main(world):
        await in_process(world, 30, manifest(LINES[:1]))
        files = read_all(world.url)
        [name] = [name for name in files if name.endswith("posted.json")]
        posted = json.loads(files[name])
        posted["at"] = (utc_now() - timedelta(days=20)).isoformat()
        await RecordStore(world.url).replace(name, json.dumps(posted).encode())
        write = OutputFolder.write_unique

        async def refused(_self, _names, _data):
            raise StorageError("no room")

        monkeypatch.setattr(OutputFolder, "write_unique", refused)
        summary = await in_process(world, None, [], only_collect=True)
        assert summary.outstanding == 1
        monkeypatch.setattr(OutputFolder, "write_unique", write)
        assert (await in_process(world, None, [], only_collect=True)).stored == 1

    live(main, settings=SLOW)
