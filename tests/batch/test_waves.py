"""Waves overlap, and none waits for another's last row."""

import asyncio
from types import SimpleNamespace

import pytest

from prefect_flux_kontext.batch.deferral import Deferral
from prefect_flux_kontext.batch.spending import Spending
from prefect_flux_kontext.batch.summary import BatchSummary
from prefect_flux_kontext.batch.waves import WAVE_ROWS, run_waves
from prefect_flux_kontext.errors import LedgerError

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


def make_session():
    submitter = SimpleNamespace(stopped=None, spent=0.0, spending=Spending())
    submitter.stop = lambda why: setattr(submitter, "stopped", why)
    return SimpleNamespace(output="", submitter=submitter, deferral=Deferral(on=False))


async def run(rows, run_row, *, slots):
    """Run rows as waves; return the most that were in progress at a time."""
    under_way, most = 0, 0

    async def one(wave, row):
        await run_row(row)
        wave._release_row()

    async def run_wave(wave):
        nonlocal under_way, most
        under_way += len(wave._rows)
        most = max(most, under_way)
        await asyncio.gather(*(one(wave, row) for row in wave._rows))
        under_way -= len(wave._rows)
        return BatchSummary(rows=len(wave._rows))

    summary = await run_waves(make_session(), range(rows), run_wave, concurrent_tasks=slots)
    assert summary.rows == rows
    return most


async def test_slow_rows_delay_no_other_wave():
    loop, rows = asyncio.get_running_loop(), 12 * WAVE_ROWS
    slots, ended, began = asyncio.Semaphore(WAVE_ROWS), [], loop.time()

    async def run_row(row):
        if row % WAVE_ROWS:
            async with slots:
                await asyncio.sleep(10)
            ended.append(loop.time() - began)
        else:
            await asyncio.sleep(3_600)

    await run(rows, run_row, slots=WAVE_ROWS)
    assert max(ended) == pytest.approx(12 * 10, rel=0.05)


async def test_rows_in_progress_are_bounded_by_slots():
    most = await run(20 * WAVE_ROWS, lambda _row: asyncio.sleep(10), slots=1_000)
    assert most == 2_000


async def test_failed_wave_releases_its_rows():
    waves = []

    async def run_wave(wave):
        waves.append(wave)
        raise LedgerError("The disk is full.")

    with pytest.raises(LedgerError):
        await run_waves(make_session(), range(5_000), run_wave, concurrent_tasks=1)
    assert {wave._open for wave in waves} == {0}


async def test_repeated_wave_releases_its_rows_once():
    async def run_wave(wave):
        for _ in 2 * wave._rows:
            wave._release_row()
        return BatchSummary(rows=len(wave._rows))

    summary = await run_waves(make_session(), range(3 * WAVE_ROWS), run_wave, concurrent_tasks=1)
    assert summary.rows == 3 * WAVE_ROWS
