"""Temporary files of killed runs are removed, and nothing else."""

import os
import signal
import time

import pytest

from prefect_flux_kontext.manifest.reader import Manifest
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from prefect_flux_kontext.storage.atomic import remove_temporary_files
from prefect_flux_kontext.storage.filesystem import OutputFolder
from tests.storage.test_filesystem import writer
from tests.support.batches import KEY, run

pytestmark = pytest.mark.anyio

OLD = ".cat.jpg.0123456789ab.part"


def put(path, *, hours):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"half a cat")
    then = time.time() - hours * 3_600
    os.utime(path, (then, then))
    return path


async def test_sweep_removes_only_temporary_files_over_a_day_old(tmp_path):
    gone = [put(tmp_path / OLD, hours=25), put(tmp_path / ".a.b.c.ffffffffffff.part", hours=999)]
    kept = [
        put(tmp_path / name, hours=hours)
        for name, hours in {
            ".new.jpg.0123456789ab.part": 23,
            "cat.jpg.0123456789ab.part": 99,
            ".cat.jpg.0123.part": 99,
            ".cat.jpg.0123456789ab": 99,
            "download.part": 99,
            "cat.jpg": 99,
            f"another folder/{OLD}": 99,
        }.items()
    ]
    assert await remove_temporary_files(OutputFolder(tmp_path)) == len(gone)
    assert not any(path.exists() for path in gone)
    assert all(path.exists() for path in kept)
    assert await remove_temporary_files(OutputFolder(tmp_path), recursive=True) == 1


async def test_sweep_removes_files_of_a_killed_writer(tmp_path):
    with writer(tmp_path, 16 * 2**20, "forever") as process:
        process.stdin.write("go\n")
        process.stdin.flush()
        while not list(tmp_path.glob(".*.part")):
            assert process.poll() is None
        process.send_signal(signal.SIGSTOP)
        left = list(tmp_path.glob(".*.part"))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    for path in left:
        if path.exists():
            os.utime(path, (0, 0))
    await remove_temporary_files(OutputFolder(tmp_path))
    assert not any(path.exists() for path in left)


async def test_run_sweeps_its_output_and_ledger(tmp_path):
    parts = [
        put(tmp_path / folder / OLD, hours=25) for folder in (".", "_ledger/rows/aa", "_ledger")
    ]
    with running_sandbox(SandboxSettings(mean=0.1, long_edge=64, api_key=KEY)) as sandbox:
        summary = await run(sandbox, Manifest([{"id": "a", "prompt": "oil"}]), tmp_path)
    assert summary.stored == 1
    assert not any(path.exists() for path in parts)


@pytest.mark.parametrize("url", ["{tmp_path}/missing", "memory://nothing"])
async def test_sweep_accepts_a_missing_folder(url, tmp_path):
    assert await remove_temporary_files(OutputFolder(url.format(tmp_path=tmp_path))) == 0


async def test_sweep_does_not_follow_symlink_loops(tmp_path):
    (tmp_path / "circle").symlink_to(tmp_path)
    put(tmp_path / OLD, hours=25)
    assert await remove_temporary_files(OutputFolder(tmp_path), recursive=True) == 1
