"""Progress of a batch: a bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import asyncio
import sys
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from prefect_flux_kontext.batch.row import RowRunner

# A log needs a sign of life, a terminal a bar that moves smoothly.
_LINE_INTERVAL_SECONDS = 10.0
_BAR_INTERVAL_SECONDS = 0.2


@asynccontextmanager
async def show_progress(runner: RowRunner, rows: int) -> AsyncIterator[None]:
    """Show the runner's progress on standard output while the block runs.

    Args:
        runner: Counts the rows.
        rows: Rows in total.
    """
    if sys.stdout.isatty():
        open_display, seconds = _open_bar, _BAR_INTERVAL_SECONDS
    else:
        open_display, seconds = _open_lines, _LINE_INTERVAL_SECONDS
    with open_display(runner, rows) as update:
        updating = asyncio.create_task(_repeat(update, seconds))
        try:
            yield
        finally:
            updating.cancel()


async def _repeat(update: Callable[[], None], seconds: float) -> None:
    while True:
        await asyncio.sleep(seconds)
        update()


@contextmanager
def _open_bar(runner: RowRunner, rows: int) -> Iterator[Callable[[], None]]:
    columns = (
        TextColumn("restyling"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[counts]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task("", total=rows, counts="")

        def update() -> None:
            bar.update(task, completed=runner.progress.rows, counts=_format_counts(runner))

        yield update
        update()


@contextmanager
def _open_lines(runner: RowRunner, rows: int) -> Iterator[Callable[[], None]]:
    def update() -> None:
        done = runner.progress.rows
        print(f"{done} of {rows} rows done: {_format_counts(runner)}", flush=True)

    yield update


def _format_counts(runner: RowRunner) -> str:
    progress = runner.progress
    return f"{progress.stored} stored, {progress.failed} failed, ${progress.spent:.2f} spent"
