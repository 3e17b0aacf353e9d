"""Rows that earlier runs stored and that a run has nothing to do about: they are only counted."""

from __future__ import annotations

from datetime import datetime
from posixpath import splitext
from typing import TYPE_CHECKING

from prefect_flux_kontext.batch.result_rows import compute_stored_digest
from prefect_flux_kontext.batch.summary import BatchSummary
from prefect_flux_kontext.images.persist import list_image_names
from prefect_flux_kontext.manifest.row import RefusedRow, Row
from prefect_flux_kontext.telemetry import count_stored_rows

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prefect_flux_kontext.batch.index import StoredRow
    from prefect_flux_kontext.batch.session import Session


def count_stored(
    session: Session, rows: Iterable[Row | RefusedRow]
) -> tuple[list[Row | RefusedRow], BatchSummary]:
    """Return the rows that there is something to do about, and the counts of the others; blocking.

    A row is only counted if its images are in the output under its own name, and the results have
    the line that a run would write.
    """
    rows = list(rows)
    stored = session.index.select_stored(row.key for row in rows if isinstance(row, Row))
    left, counts, since = [], BatchSummary(), session.options.since
    folder = str(session.output)
    for row in rows:
        known = stored.get(row.key) if isinstance(row, Row) else None
        if (
            isinstance(row, RefusedRow)
            or known is None
            or not _is_complete(session, row, known, folder)
        ):
            left.append(row)
            continue
        counts.stored += 1
        counts.already_stored += since is None or datetime.fromisoformat(known.at) < since
        for flag in known.flags:
            counts.flags[flag] = counts.flags.get(flag, 0) + 1
    counts.rows = counts.stored
    count_stored_rows(counts.rows)
    return left, counts


def _is_complete(session: Session, row: Row, stored: StoredRow, folder: str) -> bool:
    for number, file in enumerate(stored.files, start=1):
        names = list_image_names(row.name, number, splitext(file)[1], row.key)
        if file not in names:
            return False
    uris = [f"{folder}/{file}" for file in stored.files]
    return session.report.has_line(
        compute_stored_digest(row, uris)
    ) and not session.output.find_missing(stored.files)
