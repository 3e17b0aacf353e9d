"""A batch makes no call that blocks the event loop."""

import asyncio
import csv
import gzip
import time

import pytest
from blockbuster import BlockBuster, BlockingError

import prefect_flux_kontext
from prefect_flux_kontext.manifest.reader import Manifest
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from tests.support.batches import run

pytestmark = pytest.mark.anyio


@pytest.fixture
def no_blocking_calls():
    """Make blocking calls of the package raise, except those of the sandbox."""
    detector = BlockBuster(prefect_flux_kontext, excluded_modules=["prefect_flux_kontext.sandbox"])
    # The heartbeat reads /proc, which is in memory.
    detector.functions["io.TextIOWrapper.read"].can_block_in("heartbeat.py", "_read_process_start")
    # The coverage tool has a lock of its own.
    detector.functions["threading.Lock.acquire"].can_block_in("collector.py", "lock_data")
    detector.activate()
    try:
        yield
    finally:
        detector.deactivate()


async def test_detector_finds_a_blocking_call(no_blocking_calls, monkeypatch, tmp_path):
    # The function's code is taken to be in the package, as the detector goes by file names.
    code = "def block(): time.sleep(0)"
    space = {"time": time}
    exec(compile(code, f"{prefect_flux_kontext.__path__[0]}/__init__.py", "exec"), space)
    with pytest.raises(BlockingError):
        space["block"]()


@pytest.mark.parametrize("packed", ["manifest.csv", "manifest.csv.gz"])
async def test_batch_makes_no_blocking_call(packed, tmp_path, no_blocking_calls):
    with running_sandbox(SandboxSettings(mean=0.2, long_edge=64, fail_rate=0.1)) as sandbox:
        manifest = tmp_path / packed

        def write():
            opener = gzip.open if packed.endswith("gz") else open
            with opener(manifest, "wt") as file:
                writer = csv.writer(file)
                writer.writerow(["id", "image", "prompt"])
                image = f"{sandbox.url}/references/cat.png"
                writer.writerows([f"row-{n}", image, f"oil, take {n}"] for n in range(40))

        await asyncio.to_thread(write)
        for run_number in range(2):
            summary = await run(sandbox, Manifest(str(manifest)), tmp_path / "out")
            assert summary.rows == 40, run_number
            assert summary.stored > 20
