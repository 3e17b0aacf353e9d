"""What a batch shows on the page of its flow run: progress that moves, a summary, the pictures.

Three artifacts a batch. They are a view: what goes wrong with them never fails the batch, and
delays its end by seconds at most.
"""

from __future__ import annotations

import asyncio
import html
import logging
import re
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote

from prefect.artifacts import (
    acreate_image_artifact,
    acreate_markdown_artifact,
    acreate_progress_artifact,
    aupdate_progress_artifact,
)

from prefect_flux_kontext.errors import StorageError
from prefect_flux_kontext.report.gallery.builder import CONTACT_SHEET, GALLERY

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

    from prefect_flux_kontext.batch.summary import BatchSummary
    from prefect_flux_kontext.storage.filesystem import OutputFolder

_T = TypeVar("_T")

logger = logging.getLogger(__name__)

UPDATE_SECONDS = 5.0
"""Between two updates of the progress, each of which is a request to Prefect's API."""

_UPDATES, _ROWS_OF_ONE = 5, 250
"""Each update is an event as well: at most so many in a batch, or one for so many rows."""

PROGRESS, SUMMARY, PICTURES = "flux-kontext-progress", "flux-kontext-summary", "flux-kontext-sheet"

_PATIENCE_SECONDS = 5.0
_FILES = (GALLERY, CONTACT_SHEET, "results.parquet", "results.jsonl", "failed.csv")
_ROWS_TOLD = 20
_LONGEST_TOLD = 200
_MARKDOWN = re.compile(r"([\\`*\[\]|])")


@asynccontextmanager
async def progress_artifact(
    batch: BatchSummary, rows: int, tick: Callable[[], None]
) -> AsyncIterator[None]:
    """Keep a progress artifact up to date while the block runs.

    Args:
        batch: What became of the rows so far; it moves.
        rows: How many there are in all.
        tick: Called each time as well, and at the end.
    """
    moving = asyncio.create_task(_move(batch, rows, tick))
    try:
        yield
    finally:
        tick()
        moving.cancel()
        await asyncio.wait({moving}, timeout=2 * _PATIENCE_SECONDS)


async def _move(batch: BatchSummary, rows: int, tick: Callable[[], None]) -> None:
    told = f"{rows:,} rows to {batch.output}"
    creating = asyncio.create_task(_tried(acreate_progress_artifact(0, PROGRESS, told)))
    describe_reference = 0
    step = min(rows / _UPDATES, _ROWS_OF_ONE)

    async def update(at_least: float) -> None:
        nonlocal describe_reference
        shown = await asyncio.shield(creating)
        if shown is not None and abs(batch.rows - describe_reference) > at_least:
            describe_reference = batch.rows
            percent = 100 * min(1, batch.rows / max(rows, 1))
            told = f"{batch.rows:,} of {rows:,} rows: {batch}"
            await _tried(aupdate_progress_artifact(shown, percent, told))

    try:
        while True:
            await asyncio.sleep(UPDATE_SECONDS)
            tick()
            await update(step)
    finally:
        await update(0)


async def show_summary(
    batch: BatchSummary, folder: OutputFolder, outcome: str, public_urls: Mapping[str, str]
) -> None:
    """Put a summary of the batch on the page of the flow run, and its pictures where possible.

    Args:
        batch: What became of its rows.
        folder: Its output.
        outcome: How it ended, in a word.
        public_urls: Where a browser finds outputs: prefixes, and the http(s) URLs they have.
    """
    there = [name for name in _FILES if await _is_there(folder, name)]
    urls = {name: browser_url(folder.uri(name), public_urls) for name in there}
    files = {name: urls[name] or folder.uri(name) for name in there}
    text = summary_markdown(batch, outcome, files)
    await _tried(acreate_markdown_artifact(text, SUMMARY, f"{outcome}: {batch.output}"))
    if sheet := urls.get(CONTACT_SHEET):
        await _tried(acreate_image_artifact(sheet, PICTURES, f"The images of {batch.output}"))


async def _is_there(folder: OutputFolder, name: str) -> bool:
    try:
        async with asyncio.timeout(_PATIENCE_SECONDS):
            return await folder.exists(name)
    except (StorageError, TimeoutError):
        return False


def browser_url(uri: str, public_urls: Mapping[str, str]) -> str | None:
    """Where a browser finds a stored file, or None where it cannot. Never a signed URL."""
    if uri.startswith(("http://", "https://")):
        return uri
    for prefix in sorted(public_urls, key=len, reverse=True):
        below = uri.removeprefix(prefix.rstrip("/") + "/")
        if below != uri:
            return f"{public_urls[prefix].rstrip('/')}/{quote(below)}"
    return None


def summary_markdown(batch: BatchSummary, outcome: str, files: Mapping[str, str]) -> str:
    """The summary as Markdown: counts, dollars, reasons, files and the first failed rows."""
    numbers = [
        ("Stored", f"{batch.stored:,} of {batch.rows:,}"),
        ("Stored before this run", f"{batch.already_stored:,}"),
        ("Failed", f"{batch.failed:,}"),
        ("Unknown, may be paid for", f"{batch.unknown:,}"),
        ("Outstanding, paid for and not yet stored", f"{batch.outstanding:,}"),
        ("Not submitted", f"{batch.not_submitted:,}"),
        ("Spent", f"${batch.spent:,.2f}"),
        ("Took", f"{batch.seconds:,.0f} s"),
    ]
    # What is none is left out, but for the images and the money.
    told = [(name, number) for name, number in numbers if number != "0"]
    parts = [f"# {_plain(outcome).capitalize()}: {_plain(batch.output)}", _table(["", ""], told)]
    if batch.reasons:
        reasons = sorted(batch.reasons.items(), key=lambda item: -item[1])
        rows = [(_plain(reason), f"{number:,}") for reason, number in reasons[:_ROWS_TOLD]]
        parts += ["## Not stored, and why", _table(["reason", "rows"], rows)]
    if batch.failures:
        names = ["row", "line", "state", "what happened", "task"]
        failures = [
            (
                _plain(row.id),
                str(row.line),
                row.state.replace("_", " "),
                _plain(row.message or row.reason or ""),
                _plain(row.task_id or ""),
            )
            for row in batch.failures[:_ROWS_TOLD]
        ]
        parts += ["## The first of them", _table(names, failures)]
    if files:
        links = [
            f"- [{name}]({where})" if where.startswith("http") else f"- {name}: {_plain(where)}"
            for name, where in files.items()
        ]
        parts += ["## Files", "\n".join(links)]
    return "\n\n".join(parts) + "\n"


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines: list[Sequence[str]] = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _plain(text: str) -> str:
    """Text of anybody's, such that Markdown and HTML show it and do nothing else."""
    line = " ".join(text.split())
    cut = line if len(line) <= _LONGEST_TOLD else f"{line[:_LONGEST_TOLD]} …"
    return _MARKDOWN.sub(r"\\\1", html.escape(cut, quote=False))


async def _tried(request: Awaitable[_T]) -> _T | None:
    try:
        async with asyncio.timeout(_PATIENCE_SECONDS):
            return await request
    except Exception as error:  # noqa: BLE001 - whatever it is, the batch goes on
        logger.debug("An artifact was not written: %s", error)
        return None
