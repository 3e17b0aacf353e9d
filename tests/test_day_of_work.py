"""A process that works for a day, on a clock that jumps: nothing of it may pile up."""

import asyncio
import gc
import tempfile
import tracemalloc
from pathlib import Path

import httpx
import pytest

from prefect_flux_kontext.batch import session
from prefect_flux_kontext.batch.policy import RowOptions
from prefect_flux_kontext.batch.runner import run_batch
from prefect_flux_kontext.client.client import FluxKontextClient
from prefect_flux_kontext.client.limits.account import AccountLimiter
from prefect_flux_kontext.client.polling import PollingCadence
from prefect_flux_kontext.images.download import open_download_client
from prefect_flux_kontext.manifest.reader import Manifest
from prefect_flux_kontext.sandbox.app import Sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from prefect_flux_kontext.settings import FluxKontextSettings
from prefect_flux_kontext.storage.filesystem import OutputFolder

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time, pytest.mark.timeout(1_200)]

KEY = "key-of-the-tests"
HOURS = 24
ROWS = 5
WARM_UP_HOURS = 4


def measure(folder):
    """Return what a process could leak."""
    gc.collect()
    return {
        "memory": tracemalloc.get_traced_memory()[0],
        "files": len(list(Path("/proc/self/fd").iterdir())),
        "tasks": len(asyncio.all_tasks()),
        "temporary": len(list(folder.rglob("*"))),
    }


async def work_an_hour(hour, output, monkeypatch):
    """Run a batch of the hour against a service of its own, and sleep until the hour is over."""
    app = Sandbox(SandboxSettings(mean=20, long_edge=64, api_key=KEY)).app
    transport = httpx.ASGITransport(app)
    limiter = AccountLimiter(requests_per_minute=10_000, concurrent_tasks=10)
    client = FluxKontextClient(
        KEY, base_url="http://127.0.0.1:1", transport=transport, limiter=limiter
    )
    rows = [{"id": f"{hour}-{n}", "prompt": f"hour {hour}, tower {n}"} for n in range(ROWS)]
    rows.append({"id": f"{hour}-rude", "prompt": f"nsfw {hour}"})
    options = RowOptions(cadence=PollingCadence(initial_delay=5, interval=1, timeout=600))
    folder = OutputFolder(str(output))
    with monkeypatch.context() as patched:
        patched.setattr(
            session, "open_download_client", lambda **_: open_download_client(transport)
        )
        async with session.open_session(client, folder, options, FluxKontextSettings()) as opened:
            summary = await run_batch(
                opened, Manifest(rows).rows(), lambda wave: wave.run(), concurrent_tasks=10
            )
    assert (summary.stored, summary.failed) == (ROWS, 1)
    await asyncio.sleep(3_600)


async def test_day_of_batches_leaves_nothing_behind(tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    began = asyncio.get_running_loop().time()
    tracemalloc.start()
    try:
        for hour in range(HOURS):
            await work_an_hour(hour, tmp_path / "out", monkeypatch)
            if hour == WARM_UP_HOURS:
                before = measure(temporary)
        after = measure(temporary)
    finally:
        tracemalloc.stop()
    assert asyncio.get_running_loop().time() - began > HOURS * 3_600
    # A leak would be one an hour; another thread of the tests may open a file meanwhile.
    assert after["files"] < before["files"] + HOURS // 4
    assert after["tasks"] <= before["tasks"]
    assert after["temporary"] == 0
    assert after["memory"] < before["memory"] + 500_000
