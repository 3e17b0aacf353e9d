"""How a batch is doing: a moving bar on a terminal, a plain line now and then elsewhere."""

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

_LINE_EVERY = 10.0
_BAR_EVERY = 0.2


@asynccontextmanager
async def show_progress(runner: RowRunner, rows: int) -> AsyncIterator[None]:
    """Show the runner's progress while the block runs."""
    how, every = (_bar, _BAR_EVERY) if sys.stdout.isatty() else (_lines, _LINE_EVERY)
    with how(runner, rows) as tell:
        reporter = asyncio.create_task(_repeat(tell, every))
        try:
            yield
        finally:
            reporter.cancel()


async def _repeat(tell: Callable[[], None], seconds: float) -> None:
    while True:
        await asyncio.sleep(seconds)
        tell()


@contextmanager
def _bar(runner: RowRunner, rows: int) -> Iterator[Callable[[], None]]:
    columns = (
        TextColumn("restyling"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[told]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task("", total=rows, told="")

        def tell() -> None:
            bar.update(task, completed=runner.progress.rows, told=_told(runner))

        yield tell
        tell()


@contextmanager
def _lines(runner: RowRunner, rows: int) -> Iterator[Callable[[], None]]:
    def tell() -> None:
        print(f"{runner.progress.rows} of {rows} rows done: {_told(runner)}", flush=True)

    yield tell


def _told(runner: RowRunner) -> str:
    progress = runner.progress
    return f"{progress.stored} stored, {progress.failed} failed, ${progress.spent:.2f} spent"
