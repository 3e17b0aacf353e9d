"""Rows that earlier runs stored and that a run has nothing to do about: they are only counted."""

from __future__ import annotations

import math
from posixpath import splitext
from typing import TYPE_CHECKING

from prefect_flux_kontext.batch.reference_checks import split_into_blocks
from prefect_flux_kontext.batch.result_rows import compute_stored_digest
from prefect_flux_kontext.batch.summary import BatchSummary
from prefect_flux_kontext.images.decode import EXTENSIONS
from prefect_flux_kontext.images.persist import list_image_names
from prefect_flux_kontext.manifest.row import RefusedRow, Row
from prefect_flux_kontext.telemetry import count_stored_rows

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterable, Iterator

    from prefect_flux_kontext.batch.session import Session

_ENDINGS = tuple(f".{extension}" for extension in EXTENSIONS.values())


def leave_out_stored(
    session: Session,
    rows: Iterable[Row | RefusedRow],
    counts: BatchSummary,
    loop: asyncio.AbstractEventLoop,
) -> Iterator[Row | RefusedRow]:
    """Yield the rows that there is something to do about, and count the others; blocking.

    A row is only counted if its images are in the output under its own name, and the results have
    the line that a run would write.

    Args:
        session: The batch.
        rows: All its rows.
        counts: The summary to which the counted rows are added.
        loop: The loop of the batch, which counts its progress.
    """
    for block in split_into_blocks(rows):
        left, found = _count_stored(session, block)
        counts.add(found)
        count_stored_rows(found.rows)
        loop.call_soon_threadsafe(session.progress.add, found)
        yield from left
        if session.submitter.stopped:
            return


def _count_stored(
    session: Session, rows: list[Row | RefusedRow]
) -> tuple[list[Row | RefusedRow], BatchSummary]:
    stored = session.index.select_stored(row.key for row in rows if isinstance(row, Row))
    counts, since = BatchSummary(), session.options.since
    already, since_seconds = 0, math.inf if since is None else since.timestamp()
    folder = str(session.output)
    files = (file for each in stored.values() for file in each.files)
    missing = set(session.output.find_missing(files))
    left: list[Row | RefusedRow] = []
    for row in rows:
        known = stored.get(row.key) if isinstance(row, Row) else None
        if (
            isinstance(row, RefusedRow)
            or known is None
            or not missing.isdisjoint(known.files)
            or not _has_own_names(row, known.files)
            or not session.report.has_line(
                compute_stored_digest(row, [f"{folder}/{file}" for file in known.files])
            )
        ):
            left.append(row)
            continue
        already += known.at < since_seconds
        for flag in known.flags:
            counts.flags[flag] = counts.flags.get(flag, 0) + 1
    counts.rows = counts.stored = len(rows) - len(left)
    counts.already_stored = already
    return left, counts


def _has_own_names(row: Row, files: list[str]) -> bool:
    if len(files) == 1 and files[0].removeprefix(row.name) in _ENDINGS:
        return True
    return all(
        file in list_image_names(row.name, number, splitext(file)[1], row.key)
        for number, file in enumerate(files, start=1)
    )
