"""What callbacks have told of the rows under way, and who waits to be told."""

from __future__ import annotations

import asyncio
import logging
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefect_flux_kontext.callbacks.tokens import Attempt

logger = logging.getLogger(__name__)

_STILL_IN_TIME = 5.0
"""Seconds after a row's end for which its callback counts as come: through the filesystem it may
be 2 s behind."""

_WEIGHT, _TOO_MANY_MISSED = 0.1, 0.5
"""Of the last ten rows that ended or so, the share without a callback from which on we poll."""


@dataclass(eq=False, slots=True)
class _Row:
    attempt: Attempt
    since: float
    came: asyncio.Event = field(default_factory=asyncio.Event)
    task_ids: set[str] = field(default_factory=set)
    heard: bool = False
    ended: bool = False


class Hints:
    """Hints by row. A hint for a row or an attempt that nobody expects is none.

    Attributes:
        reliable: Whether callbacks come as they should, so that there is no need to poll.
    """

    def __init__(self) -> None:
        self.reliable = True
        self._missed_share = 0.0
        self._rows: dict[str, _Row] = {}

    def expect(self, attempt: Attempt, age: float = 0.0) -> None:
        """Let hints for an attempt count, which is being made or was `age` seconds ago."""
        row = self._rows.get(attempt.key)
        if row is None or row.attempt != attempt:
            since = asyncio.get_running_loop().time() - age
            self._rows[attempt.key] = _Row(attempt, since)

    def latest(self, key: str) -> tuple[Attempt, float] | None:
        """The attempt that is expected for a row, and its age in seconds."""
        row = self._rows.get(key)
        if row is None:
            return None
        return row.attempt, asyncio.get_running_loop().time() - row.since

    def ended(self, attempt: Attempt) -> None:
        """The row is over; its hints are forgotten in a few seconds."""
        row = self._rows.get(attempt.key)
        if row is not None and row.attempt == attempt and not row.ended:
            row.ended = True
            asyncio.get_running_loop().call_later(_STILL_IN_TIME, self._judge, row)

    def expected(self, attempt: Attempt) -> bool:
        """Whether hints for this attempt count: it is under way, or ended just now."""
        return self._row(attempt) is not None

    def is_over(self, attempt: Attempt) -> bool:
        """Whether nobody has any use for this hint any more."""
        row = self._row(attempt)
        return row is None or row.ended

    def hear(self, attempt: Attempt, task_id: str | None) -> None:
        """A callback has come."""
        row = self._row(attempt)
        if row is None:
            return
        row.heard = True
        if task_id is not None:
            row.task_ids.add(task_id)
        row.came.set()

    def heard(self, attempt: Attempt) -> bool:
        """Whether a callback has come for the attempt."""
        row = self._row(attempt)
        return row is not None and row.heard

    def task_ids(self, attempt: Attempt) -> list[str]:
        """The tasks that callbacks have named for the attempt; more than one is one too many."""
        row = self._row(attempt)
        return sorted(row.task_ids) if row else []

    async def wait(self, attempt: Attempt, seconds: float = math.inf) -> bool:
        """Wait for a hint that was not waited for before; False when none has come in time."""
        row = self._row(attempt)
        if row is None:
            return False
        try:
            async with asyncio.timeout(None if seconds == math.inf else max(0.0, seconds)):
                await row.came.wait()
        except TimeoutError:
            return False
        row.came.clear()
        return True

    def _row(self, attempt: Attempt) -> _Row | None:
        row = self._rows.get(attempt.key)
        return row if row is not None and row.attempt == attempt else None

    def _judge(self, row: _Row) -> None:
        if self._rows.get(row.attempt.key) is row:
            del self._rows[row.attempt.key]
        self._missed_share += _WEIGHT * ((not row.heard) - self._missed_share)
        reliable = self._missed_share < _TOO_MANY_MISSED
        if reliable != self.reliable:
            self.reliable = reliable
            logger.warning(
                "Callbacks come again: rows wait for them."
                if reliable
                else "Rows end without a callback: they are polled until callbacks come again. "
                "Look whether the receiver can be reached from outside at its public URL."
            )
