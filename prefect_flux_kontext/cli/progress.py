"""Progress of a batch: a bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import asyncio
import sys
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from prefect_flux_kontext.batch.progress import ProgressLine

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from prefect_flux_kontext.batch.session import Session

# A log needs a sign of life, a terminal a bar that moves smoothly.
_LINE_INTERVAL_SECONDS = 10.0
_BAR_INTERVAL_SECONDS = 0.2


@asynccontextmanager
async def show_progress(session: Session, rows: int) -> AsyncIterator[None]:
    """Show a batch's progress on standard output while the block runs.

    Args:
        session: The batch.
        rows: Rows in total.
    """
    line = ProgressLine(session, rows)
    if sys.stdout.isatty():
        open_display, seconds = _open_bar, _BAR_INTERVAL_SECONDS
    else:
        open_display, seconds = _open_lines, _LINE_INTERVAL_SECONDS
    with open_display(line) as update:
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
def _open_bar(line: ProgressLine) -> Iterator[Callable[[], None]]:
    columns = (
        BarColumn(20),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task("", total=line.rows)

        def update() -> None:
            bar.update(task, completed=line.batch.rows, description=str(line))

        yield update
        update()


@contextmanager
def _open_lines(line: ProgressLine) -> Iterator[Callable[[], None]]:
    def update() -> None:
        print(f"{line.batch.rows:,} of {line.rows:,} rows done: {line}", flush=True)

    yield update
