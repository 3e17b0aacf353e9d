"""A batch as waves: rows in blocks, a few blocks under way at a time."""

from __future__ import annotations

import asyncio
import itertools
import math
from typing import TYPE_CHECKING

from prefect_flux_kontext.batch.summary import BatchSummary
from prefect_flux_kontext.errors import BatchStoppedError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from prefect_flux_kontext.batch.rows import RowRunner
    from prefect_flux_kontext.manifest.reading import Manifest
    from prefect_flux_kontext.manifest.rows import RefusedRow, Row

WAVE_ROWS = 250
"""Rows of a wave: few enough to lose little with one, enough that 100 rows are no task run."""


class Wave:
    """A block of rows and its number, from 1. No dataclass: Prefect would look into it."""

    def __init__(self, number: int, rows: list[Row | RefusedRow]) -> None:
        self.number = number
        self.rows = rows


async def run_waves(
    manifest: Manifest,
    runner: RowRunner,
    run_wave: Callable[[Wave], Awaitable[BatchSummary]],
    *,
    concurrent_tasks: int,
) -> BatchSummary:
    """Run a whole manifest, reading it as it goes.

    Waves overlap, so that the account's slots never idle at a wave's tail; as many are under
    way as fill the slots, and two more.

    Args:
        manifest: What is to be done; its `check` has passed.
        runner: Runs the rows.
        run_wave: Runs one wave, by `runner`; the place to make it a task run.
        concurrent_tasks: The account's limit of tasks running at once.

    Raises:
        BatchStoppedError: The service refuses all of them (key, balance). What was submitted
            before is stored or counted.
    """
    loop = asyncio.get_running_loop()
    began = loop.time()
    summary = BatchSummary(output=runner.progress.output)
    room = asyncio.Semaphore(math.ceil(concurrent_tasks / WAVE_ROWS) + 2)

    async def run(wave: Wave) -> None:
        try:
            summary.add(await run_wave(wave))
        finally:
            room.release()

    rows = manifest.rows()
    try:
        async with asyncio.TaskGroup() as group:
            for number in itertools.count(1):
                await room.acquire()
                block = await asyncio.to_thread(lambda: list(itertools.islice(rows, WAVE_ROWS)))
                if not block or runner.stopped:
                    break
                group.create_task(run(Wave(number, block)))
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    summary.seconds = loop.time() - began
    if runner.stopped is not None:
        raise BatchStoppedError(f"{runner.stopped} Until then: {summary}.")
    return summary
