"""What the page of a flow run shows: its name, its artifacts, and the message of its last state.

A batch has at most three artifacts: progress, a summary, and the contact sheet. They are a view:
an artifact that cannot be written never fails the batch, and delays its end by seconds at most.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import html
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import quote

from prefect.artifacts import (
    acreate_image_artifact,
    acreate_markdown_artifact,
    acreate_progress_artifact,
    aupdate_progress_artifact,
)
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed

from prefect_flux_kontext.batch.spending import shorten_groups
from prefect_flux_kontext.report.gallery.builder import CONTACT_SHEET, GALLERY, draw_run_sheet
from prefect_flux_kontext.report.thumbnails import make_thumbnail

if TYPE_CHECKING:
    from prefect_flux_kontext.batch.summary import BatchSummary
    from prefect_flux_kontext.storage.filesystem import OutputFolder

_T = TypeVar("_T")

logger = logging.getLogger(__name__)

UPDATE_INTERVAL_SECONDS = 5.0
"""Between two updates of the progress, each of which is a request to Prefect's API."""

_MAX_UPDATES = 5
_ROWS_PER_UPDATE = 250
"""Each update is also an event: a batch has `_MAX_UPDATES` at most, or one for this many rows."""

_STEP_TIMEOUT_SECONDS = 5.0
_MAX_ROWS_SHOWN = 20
_SHEET_PIXELS = 960
_DIGEST_CHARACTERS = 8
_MAX_CELL_LENGTH = 200
_LISTED_FILES = (GALLERY, CONTACT_SHEET, "results.parquet", "results.jsonl", "failed.csv")
_MARKDOWN_SYNTAX = re.compile(r"([\\`*\[\]|])")


def name_run() -> str:
    """Return the name of the current flow run: its output and its date."""
    started_at = flow_run.scheduled_start_time or datetime.now(UTC)
    output = flow_run.parameters.get("output")
    return f"{name_output(output if isinstance(output, str) else '')} · {started_at:%F}"


def name_output(output: str) -> str:
    """Return the last part of an output's path or URL."""
    return output.rstrip("/").rpartition("/")[2] or "batch"


def build_artifact_key(output: str, kind: str) -> str:
    """Return the key of an artifact, which is the same for all runs into one output."""
    name = re.sub(r"[^a-z0-9]+", "-", name_output(output).lower()).strip("-")
    digest = hashlib.sha256(output.encode(errors="surrogateescape")).hexdigest()
    return "-".join(part for part in (name, kind, digest[:_DIGEST_CHARACTERS]) if part)


@asynccontextmanager
async def progress_artifact(
    batch: BatchSummary, rows: int, line: object, on_update: Callable[[], None]
) -> AsyncIterator[None]:
    """Keep a progress artifact up to date, and call `on_update` before, while the block runs."""
    updating = asyncio.create_task(_update_periodically(batch, rows, line, on_update))
    try:
        yield
    finally:
        on_update()
        updating.cancel()
        await asyncio.wait({updating}, timeout=2 * _STEP_TIMEOUT_SECONDS)


async def _update_periodically(
    batch: BatchSummary, rows: int, line: object, on_update: Callable[[], None]
) -> None:
    title = f"{rows:,} rows to {batch.output}"
    key = build_artifact_key(batch.output, "progress")
    creating = asyncio.create_task(_try(acreate_progress_artifact(0, key, title)))
    shown_rows = 0
    step = min(rows / _MAX_UPDATES, _ROWS_PER_UPDATE)

    async def update(at_least: float) -> None:
        nonlocal shown_rows
        artifact = await asyncio.shield(creating)
        if artifact is not None and abs(batch.rows - shown_rows) > at_least:
            shown_rows = batch.rows
            percent = 100 * min(1, batch.rows / max(rows, 1))
            text = f"{batch.rows:,} of {rows:,} rows done: {line}"
            await _try(aupdate_progress_artifact(artifact, percent, text))

    try:
        while True:
            await asyncio.sleep(UPDATE_INTERVAL_SECONDS)
            on_update()
            await update(step)
    finally:
        await update(0)


async def publish_summary(
    batch: BatchSummary, folder: OutputFolder, outcome: str, public_urls: Mapping[str, str]
) -> None:
    """Write the summary of a batch as an artifact, and its contact sheet if a browser finds it."""
    stored = [name for name in _LISTED_FILES if await _try(folder.exists(name))]
    urls = {name: find_browser_url(folder.uri(name), public_urls) for name in stored}
    files = {name: urls[name] or folder.uri(name) for name in stored}
    thumbnail = await _read_sheet(folder.read(CONTACT_SHEET)) if CONTACT_SHEET in stored else None
    text = format_summary(batch, outcome, files, thumbnail)
    key, title = build_artifact_key(batch.output, "summary"), f"{outcome}: {batch.output}"
    await _try(acreate_markdown_artifact(text, key, title))
    if sheet := urls.get(CONTACT_SHEET):
        key, title = build_artifact_key(batch.output, "sheet"), f"The images of {batch.output}"
        await _try(acreate_image_artifact(sheet, key, title))


async def read_run_sheet(folder: OutputFolder, run: str) -> str | None:
    """Return a contact sheet of what a run has stored as a `data:` URL, or None."""
    return await _read_sheet(draw_run_sheet(folder, run))


async def _read_sheet(reading: Coroutine[Any, Any, bytes | None]) -> str | None:
    """Return a thumbnail of a contact sheet as a `data:` URL, or None."""

    async def shrink() -> bytes:
        return await asyncio.to_thread(make_thumbnail, await reading or b"", _SHEET_PIXELS)

    small = await _try(shrink())
    return f"data:image/webp;base64,{base64.b64encode(small).decode()}" if small else None


def find_browser_url(uri: str, public_urls: Mapping[str, str]) -> str | None:
    """Return the URL at which a browser finds a stored file, or None. Never a signed URL."""
    if uri.startswith(("http://", "https://")):
        return uri
    for prefix in sorted(public_urls, key=len, reverse=True):
        below = uri.removeprefix(prefix.rstrip("/") + "/")
        if below != uri:
            return f"{public_urls[prefix].rstrip('/')}/{quote(below)}"
    return None


def format_summary(
    batch: BatchSummary, outcome: str, files: Mapping[str, str], sheet: str | None = None
) -> str:
    """Format a summary as Markdown: counts, pictures, reasons, files, first rows not stored."""
    numbers = [
        ("Stored", f"{batch.stored:,} of {batch.rows:,}"),
        ("Stored before this run", f"{batch.already_stored:,}"),
        ("Failed", f"{batch.failed:,}"),
        ("Unknown, may be paid for", f"{batch.unknown:,}"),
        ("Outstanding, paid for and not yet stored", f"{batch.outstanding:,}"),
        ("Not submitted", f"{batch.not_submitted:,}"),
        ("Spent", f"${batch.spent:,.2f}"),
        ("Balance of the account", batch.describe_balance().removeprefix("the balance ") or "0"),
        ("Duration", f"{batch.seconds:,.0f} s"),
    ]
    # Only the counts can be "0"; images, dollars and seconds are always shown.
    shown = [(name, number) for name, number in numbers if number != "0"]
    sections = [
        # A whole URL as the heading would run over the column beside it.
        f"# {_escape(outcome).capitalize()}: {_escape(name_output(batch.output))}",
        _escape(batch.output),
        _format_table(["", ""], shown),
    ]
    if sheet:
        sections.append(f"![contact sheet]({sheet})")
    if batch.spent_by:
        groups = [
            (*map(_escape, group.columns.values()), f"{group.rows:,}", f"${group.spent:,.2f}")
            for group in shorten_groups(batch.spent_by)
        ]
        names = [*map(_escape, batch.spent_by[0].columns), "rows", "spent"]
        sections += ["## Spent", _format_table(names, groups)]
    if batch.reasons:
        reasons = sorted(batch.reasons.items(), key=lambda item: -item[1])
        rows = [(_escape(reason), f"{number:,}") for reason, number in reasons[:_MAX_ROWS_SHOWN]]
        sections += ["## Reasons of rows not stored", _format_table(["reason", "rows"], rows)]
    if batch.failures:
        names = ["row", "line", "state", "what happened", "task"]
        failures = [
            (
                _escape(row.id),
                str(row.line),
                row.state.replace("_", " "),
                _escape(row.message or row.reason or ""),
                _escape(row.task_id or ""),
            )
            for row in batch.failures[:_MAX_ROWS_SHOWN]
        ]
        sections += ["## First rows not stored", _format_table(names, failures)]
    if files:
        links = [
            f"- [{name}]({where})" if where.startswith("http") else f"- {name}: {_escape(where)}"
            for name, where in files.items()
        ]
        sections += ["## Files", "\n".join(links)]
    return "\n\n".join(sections) + "\n"


def _format_table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines: list[Sequence[str]] = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _escape(text: str) -> str:
    """Shorten untrusted text, and escape it so that Markdown and HTML only show it."""
    line = " ".join(text.split())
    short = line if len(line) <= _MAX_CELL_LENGTH else f"{line[:_MAX_CELL_LENGTH]} …"
    return _MARKDOWN_SYNTAX.sub(r"\\\1", html.escape(short, quote=False))


def complete(summary: BatchSummary) -> BatchSummary:
    """Return the end state of a flow run, with its counts as the message.

    Callers of the flow get the summary.
    """
    if flow_run.run_count > 1:
        # Prefect raises the error of an earlier attempt at callers of a flow that returns a state.
        return summary
    counts = [
        (summary.failed, "failed"),
        (summary.unknown, "unknown"),
        (summary.outstanding, "outstanding"),
        (summary.not_submitted, "not submitted"),
    ]
    parts = [
        f"{summary.stored:,} of {summary.rows:,} stored",
        *(f"{number:,} {label}" for number, label in counts if number),
        f"${summary.spent:,.2f}",
    ]
    # A flow may return a state; Prefect hands its data to the caller.
    return cast("BatchSummary", Completed(message=", ".join(parts), data=summary))


def decline(*, after_pilot: bool = False) -> BatchSummary:
    """Return the end state of a flow run that was cancelled instead of approved."""
    more = " more" if after_pilot else ""
    message = f"The plan was declined, so nothing{more} was submitted."
    return cast("BatchSummary", Cancelled(message=message))


async def _try(step: Awaitable[_T]) -> _T | None:
    """Await a step of an artifact; return None if it fails or takes too long."""
    try:
        async with asyncio.timeout(_STEP_TIMEOUT_SECONDS):
            return await step
    except Exception as error:  # noqa: BLE001 - an artifact never fails a batch
        logger.debug("An artifact was not written: %s", error)
        return None
