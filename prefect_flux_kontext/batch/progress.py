"""The progress of a running batch in one line."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefect_flux_kontext.batch.session import Session


class ProgressLine:
    """The progress of a running batch, and the time left as learned from its rows so far.

    Args:
        session: The batch.
        rows: Rows in total.
    """

    def __init__(self, session: Session, rows: int) -> None:
        self.batch = session.progress
        self.rows = rows
        self._submitter = session.submitter
        self._loop = asyncio.get_running_loop()
        self._began = self._ended_at = self._loop.time()
        self._ended = self._first = 0

    def __str__(self) -> str:
        """Return `32 submitted · 31 running · 1 stored · $0.96 · about 20 s left`."""
        batch, submitter = self.batch, self._submitter
        counts = [
            (submitter.accepted, "submitted"),
            (len(submitter.outstanding), "running"),
            (batch.stored, "stored"),
            (batch.failed, "failed"),
            (batch.unknown, "unknown"),
        ]
        parts = [f"{number:,} {label}" for number, label in counts if number or label == "stored"]
        parts.append(f"${submitter.spent:,.2f}")
        left = self._estimate_seconds_left()
        if left > 0:
            parts.append(f"about {format_duration(left)} left")
        return " · ".join(parts)

    def _estimate_seconds_left(self) -> float:
        """Return the seconds left at the pace since the first rows ended; 0 if not known yet.

        Until then, the rows have waited for the service, which says nothing about the pace.
        """
        now, ended = self._loop.time(), self.batch.rows - self.batch.already_stored
        if ended != self._ended:
            if not self._ended:
                self._began, self._first = now, ended
            self._ended, self._ended_at = ended, now
        if ended == self._first:
            return 0.0
        seconds_a_row = (self._ended_at - self._began) / (ended - self._first)
        return (self.rows - self.batch.rows) * seconds_a_row - (now - self._ended_at)


def format_duration(seconds: float) -> str:
    """Return a duration rounded up, such as `45 s`, `3 min` or `2.5 h`."""
    minutes = math.ceil(seconds / 60)
    if minutes < 2:  # noqa: PLR2004 - below two minutes, seconds are worth showing
        return f"{math.ceil(seconds)} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"  # noqa: PLR2004
