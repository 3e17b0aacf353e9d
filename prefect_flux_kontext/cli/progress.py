"""Progress of a batch: a bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from prefect_flux_kontext.batch.progress import ProgressLine

if TYPE_CHECKING:
    from prefect_flux_kontext.batch.session import Session

# A log needs a sign of life, a terminal a bar that moves smoothly.
_LINE_INTERVAL_SECONDS = 10.0
_BAR_INTERVAL_SECONDS = 0.2


@asynccontextmanager
async def show_progress(session: Session, rows: int) -> AsyncIterator[None]:
    """Show the progress of a batch of `rows` rows on standard output while the block runs."""
    line = ProgressLine(session, rows)

    def print_line() -> None:
        print(f"{line.batch.rows:,} of {rows:,} rows done: {line}", flush=True)

    if not sys.stdout.isatty():
        with _repeat(print_line, _LINE_INTERVAL_SECONDS):
            yield
        return
    columns = (
        BarColumn(20),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task("", total=rows)

        def update() -> None:
            bar.update(task, completed=line.batch.rows, description=str(line))

        with _repeat(update, _BAR_INTERVAL_SECONDS):
            yield
        update()


@contextmanager
def _repeat(update: Callable[[], None], seconds: float) -> Iterator[None]:
    async def repeat() -> None:
        while True:
            await asyncio.sleep(seconds)
            update()

    repeating = asyncio.create_task(repeat())
    try:
        yield
    finally:
        repeating.cancel()
