"""Outstanding rows of killed and stopped runs are collected, reported and counted."""

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
from tests.batch.simulated import LINES, SLOW, check_invariants, fault_on, run_simulation
from tests.chaos.checker import read_all
from tests.chaos.simulation import in_process, manifest


def test_collect_stores_rows_of_a_killed_run():
    async def main(env):
        assert await in_process(env, 20, manifest(LINES)) is None
        paid = env.posts
        summary = await in_process(env, None, [], only_collect=True)
        assert paid == env.posts
        assert (summary.stored, summary.not_submitted) == (paid, 0)
        await check_invariants(env, LINES, complete=False)
        summary = await in_process(env, None, manifest(LINES))
        assert (summary.stored, env.posts) == (10, 10)
        await check_invariants(env, LINES)

    run_simulation(main, settings=SLOW)


def test_collect_reports_rows_that_killed_runs_stored():
    async def main(env):
        # The run is killed after it stored a row and before its wave has ended.
        assert await in_process(env, 90, manifest(LINES)) is None
        await in_process(env, None, [], only_collect=True)
        files = read_all(env.url)
        lines = [json.loads(line) for line in files["results.jsonl"].splitlines()]
        stored = {line["id"] for line in lines if line["state"] == "stored"}
        assert stored == {name[:-4] for name in files if name.endswith(".jpg")}
        assert any(line["stored_before"] for line in lines)
        assert {line["source"] for line in lines} == {"manifest", "ledger"}
        await in_process(env, None, manifest(LINES))
        lines = list(map(json.loads, read_all(env.url)["results.jsonl"].splitlines()))
        assert [line["state"] for line in lines] == ["stored"] * 10
        assert {line["source"] for line in lines} == {"manifest"}

    run_simulation(main, settings=SLOW)


def test_row_of_many_killed_runs_is_counted_once():
    async def main(env):
        for _ in range(4):
            assert await in_process(env, 5, manifest(LINES)) is None
        paid = env.posts
        summary = await in_process(env, None, [], only_collect=True)
        assert (summary.rows, summary.stored) == (paid, paid)

    run_simulation(main, settings=SLOW)


def test_stopped_run_keeps_earlier_rows_outstanding():
    """It does not collect them, so it must not remove them from the open waves either."""

    async def main(env):
        await in_process(env, 20, manifest(LINES[:5]))
        env.hook = fault_on("submit", "no_balance")
        stopped = await in_process(env, None, manifest([("new", "new")]))
        assert isinstance(stopped, BatchStoppedError)
        env.hook = None
        await check_invariants(env, LINES, complete=False)
        summary = await in_process(env, None, [], only_collect=True)
        assert summary.stored == 5
        assert env.posts == 5

    run_simulation(main, settings=SLOW)


def test_refused_collection_keeps_rows_outstanding():
    async def main(env):
        first = await in_process(env, None, manifest(LINES))
        assert first.outstanding == 10
        # More waves than are under way at once, so that some are not even begun.
        waves.WAVE_ROWS = 1  # the end of the simulation puts it back
        env.hook = fault_on("status", "unauthorized")
        await in_process(env, None, [], only_collect=True)
        env.hook = None
        await check_invariants(env, LINES, complete=False)
        assert (await in_process(env, None, [], only_collect=True)).stored == 10

    run_simulation(main, hook=fault_on("download", "download_trouble"))


@pytest.mark.parametrize(
    ("days", "warned", "code"),
    [(5, False, None), (13, True, None), (16, True, "DownloadError"), (16, True, "expired")],
)
def test_collect_warns_before_expiry_and_reports_expired_rows(
    caplog, monkeypatch, days, warned, code
):
    """A result has expired if the service's own time says so, not this machine's record."""

    async def main(env):
        await in_process(env, 30, manifest(LINES[:1]))
        files = read_all(env.url)
        [name] = [name for name in files if name.endswith("posted.json")]
        posted = json.loads(files[name])
        posted["at"] = (utc_now() - timedelta(days=days)).isoformat()
        await RecordStore(env.url).replace(name, json.dumps(posted).encode())
        if code:
            env.hook = fault_on("download", "download_trouble")
        with caplog.at_level(logging.WARNING), monkeypatch.context() as patch:
            if code == "expired":
                later = utc_now() + timedelta(days=days)
                patch.setattr("prefect_flux_kontext.batch.storing.utc_now", lambda: later)
            summary = await in_process(env, None, [], only_collect=True)
        assert ("its result expires in" in caplog.text) is warned
        assert summary.stored == (code is None)
        assert list(summary.reasons) == ([code] if code else [])
        if code:
            # The clock may be wrong, so the row is collected as soon as that is possible.
            env.hook = None
            assert (await in_process(env, None, [], only_collect=True)).stored == 1

    run_simulation(main, settings=SLOW)


def test_storage_error_does_not_expire_an_old_result(monkeypatch):
    async def main(env):
        await in_process(env, 30, manifest(LINES[:1]))
        files = read_all(env.url)
        [name] = [name for name in files if name.endswith("posted.json")]
        posted = json.loads(files[name])
        posted["at"] = (utc_now() - timedelta(days=20)).isoformat()
        await RecordStore(env.url).replace(name, json.dumps(posted).encode())
        write = OutputFolder.write_unique

        async def refused(_self, _names, _data):
            raise StorageError("no room")

        monkeypatch.setattr(OutputFolder, "write_unique", refused)
        summary = await in_process(env, None, [], only_collect=True)
        assert summary.outstanding == 1
        monkeypatch.setattr(OutputFolder, "write_unique", write)
        assert (await in_process(env, None, [], only_collect=True)).stored == 1

    run_simulation(main, settings=SLOW)
