"""Ledger and results of the first release, frozen: every later release reads them.

`first_format/` is what release 0.1 left of `manifest.csv` in `out`: rows that are stored, failed,
rejected, unknown and outstanding, one in a pack, a single request, a part of results that is not
merged, a callback, a suspended flow run and a partition. Its files are never changed.
"""

import asyncio
import json
import re
import shutil
from pathlib import Path

import httpx
import pytest

from prefect_flux_kontext.batch.runner import _read_allowed
from prefect_flux_kontext.callbacks.inbox import Inbox
from prefect_flux_kontext.cli import main
from prefect_flux_kontext.errors import LedgerError
from prefect_flux_kontext.ledger.head import check_format
from prefect_flux_kontext.ledger.heartbeat import is_alive
from prefect_flux_kontext.ledger.ledger import Ledger
from prefect_flux_kontext.ledger.packs import Packs
from prefect_flux_kontext.ledger.store import RecordStore
from prefect_flux_kontext.ledger.waves import read_finished_rows, read_open_waves
from prefect_flux_kontext.orchestration.partitions.files import read_progress
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings

FROZEN = Path(__file__).parent / "first_format"
OUTSTANDING = {"task_3f32a5fc21bab70b": "a slow hill", "task_c1e5a640483ee6c8": "a single request"}
FLOW_RUN = "7d7f1f0e-5a3b-4a7e-9c63-0b1f3c2d4e5f"
UNKNOWN = "3f1416c1b1290e6bc6247f82ee10385b"
RECORDS = sorted(
    path.relative_to(FROZEN / "out" / "_ledger").as_posix()
    for path in (FROZEN / "out" / "_ledger").rglob("*.json*")
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the frozen files."""
    copy = tmp_path / "copy"
    shutil.copytree(FROZEN, copy)
    monkeypatch.chdir(copy)
    return copy


@pytest.fixture
def store(folder):
    return RecordStore(str(folder / "out" / "_ledger"))


@pytest.fixture
def sandbox(monkeypatch):
    """A service that has the outstanding tasks."""
    with running_sandbox(SandboxSettings(mean=0.05, long_edge=16, api_key="key")) as running:
        monkeypatch.setenv("FLUX_KONTEXT_API_KEY", "key")
        monkeypatch.setenv("FLUX_KONTEXT_BASE_URL", running.url)
        monkeypatch.setenv("FLUX_KONTEXT_POLL_INITIAL_DELAY", "0")
        monkeypatch.setenv("FLUX_KONTEXT_POLL_INTERVAL", "0.05")
        for task_id, prompt in OUTSTANDING.items():
            reply = httpx.post(
                f"{running.url}/api/v1/generateTask/flux-kontext",
                json={"input": {"mode": "pro", "prompt": prompt}},
                headers={"Authorization": "Bearer key"},
                trust_env=False,
            )
            tasks = running.service._tasks
            task = tasks.pop(reply.json()["data"]["taskId"])
            task.task_id = task_id
            tasks[task_id] = task
        yield running


def read_results(folder):
    lines = (folder / "out" / "results.jsonl").read_text().splitlines()
    return {line["id"]: line for line in map(json.loads, lines)}


def test_each_record_has_a_version():
    for name in RECORDS:
        for line in (FROZEN / "out" / "_ledger" / name).read_text().splitlines():
            if line:
                assert json.loads(line)["version"] == 1, name
    assert {name.partition("/")[0] for name in RECORDS} == {
        "callbacks",
        "failed.json",
        "format.json",
        "owners",
        "packs",
        "partitions",
        "rows",
        "waiting",
        "waves",
    }


def test_status_reads_the_first_format(folder, capsys):
    assert main(["status", "out", "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["states"] == {"stored": 3, "failed": 2, "unknown": 1, "accepted": 2}
    assert [row["key"] for row in status["unknown"]] == [UNKNOWN]


def test_plan_reads_the_first_format(folder, capsys):
    assert main(["plan", "manifest.csv", "out", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    counts = ("to_pay", "stored", "duplicates", "outstanding", "unknown", "failed", "spent_usd")
    assert [plan[name] for name in counts] == [2, 2, 1, 1, 1, 1, 0.21]


def test_resume_pays_only_for_new_rows(folder, sandbox, capsys):
    assert main(["run", "manifest.csv", "out", "-q"]) == 1
    prompts = sorted(task.input.prompt for task in sandbox.service._tasks.values())
    assert prompts == ["a new field", "a refused sky", "a single request", "a slow hill"]
    states = {name: line["state"] for name, line in read_results(folder).items()}
    not_stored = {name: state for name, state in states.items() if state != "stored"}
    assert not_stored == {"blocked": "failed", "lost": "unknown"}
    assert {"mug", "mug-again", "sea", "part", "slow", "refused", "new"} <= states.keys()


def test_collect_stores_outstanding_rows(folder, sandbox):
    main(["collect", "out", "-q"])
    assert read_results(folder)["slow"]["state"] == "stored"


def test_gallery_merges_the_parts_of_results(folder):
    assert main(["gallery", "out"]) == 0
    results = read_results(folder)
    assert results["part"]["state"] == "stored"
    assert results["mug"]["sku"] == "A-1"


def test_progress_of_a_partition_is_read(store):
    assert asyncio.run(read_progress(store, FLOW_RUN)).stored == 2


READERS = {
    "rows/*/*.intent.json": lambda store, key, _: Ledger(store, "us", {}).read(key),
    "rows/*/*.posted.json": lambda store, key, _: Ledger(store, "us", {}).read(key),
    "rows/*/*.ended.json": lambda store, key, _: Ledger(store, "us", {}).read(key),
    "packs/*/*.jsonl": lambda store, _, path: Packs(store).list_keys(path.parent.name),
    "waves/*.jsonl": lambda store, *_: read_all(read_finished_rows(store)),
    "waves/*.open.json": lambda store, *_: read_all(read_open_waves(store)),
    "owners/*.json": lambda store, owner, _: is_alive(store, owner),
    "callbacks/*/*.jsonl": lambda store, _, path: Inbox(store.below("callbacks")).read(
        path.parent.name, path.name
    ),
    "format.json": lambda store, *_: check_format(store),
    "failed.json": lambda store, *_: _read_allowed(store),
}
"""What reads each kind of record that counts, given the first part of its name and its path."""


async def read_all(rows):
    return [row async for row in rows]


@pytest.mark.parametrize("kind", READERS)
def test_record_of_a_newer_version_is_refused(store, folder, kind):
    path = next((folder / "out" / "_ledger").glob(kind))
    name = path.name.partition(".")[0]
    asyncio.run(READERS[kind](store, name, path))
    path.write_text(re.sub(r'"version": ?1', '"version": 2', path.read_text()))
    with pytest.raises(LedgerError) as caught:
        asyncio.run(READERS[kind](store, name, path))
    assert str(caught.value) == (
        "A record of this output has version 2 and this release reads version 1: "
        "upgrade prefect-flux-kontext."
    )


@pytest.mark.parametrize("command", ["status", "gallery", "collect", "rebind", "repair"])
def test_commands_refuse_a_newer_ledger(folder, sandbox, capsys, command):
    head = folder / "out" / "_ledger" / "format.json"
    newer = {**json.loads(head.read_text()), "format": 2, "oldest_reader": 2}
    head.write_text(json.dumps(newer))
    assert main([command, "out"]) == 2
    assert "upgrade prefect-flux-kontext." in capsys.readouterr().err
    assert json.loads(head.read_text()) == newer
