"""How many of the tasks we watch still run at the service, as far as can be told."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prefect_flux_kontext.api.latency_curve import Table

if TYPE_CHECKING:
    from collections.abc import Collection

    from prefect_flux_kontext.api.latency_curve import LatencyCurve

_ENOUGH = 50
"""Tasks that must have ended before their curve is trusted with submits."""

_STALE = 0.2
"""Seconds for which a count is used before it is made again."""

_NOTHING_KNOWN = Table([1.0], [], 0.0)


@dataclass(slots=True)
class Watched:
    """A task that somebody waits for.

    Attributes:
        began: Loop time at which its submit was answered.
        curve: How long tasks of its kind take; None where nothing is known.
        reached: Age in seconds at which it was last seen to run.
    """

    began: float
    curve: LatencyCurve | None = None
    reached: float = 0.0


class RunningEstimate:
    """Counts each watched task as much as it is likely to run.

    A task's end is noticed seconds after it has come, and meanwhile its slot is free. Of a
    thousand tasks it is well known how many have ended, though not which.

    Attributes:
        mean: Tasks that are expected to run.
        deviation: Standard deviation of how many really do, by the dice and by the curve's error.
    """

    def __init__(self) -> None:
        self.mean = self.deviation = 0.0
        self._counted_at = -math.inf

    def refresh(self, watched: Collection[Watched], now: float, ahead: float) -> None:
        """Count them as they will be `ahead` seconds from now, unless it was just done."""
        if now < self._counted_at + _STALE:
            return
        self._counted_at = now
        at = now + ahead + _STALE / 2
        mean = variance = 0.0
        tables: dict[LatencyCurve | None, tuple[Table, list[float]]] = {}
        for task in watched:  # a thousand of them, several times a second
            if task.curve not in tables:
                curve = task.curve
                trusted = curve is not None and curve.known >= _ENOUGH
                table = curve.table() if curve and trusted else _NOTHING_KNOWN
                tables[task.curve] = table, [0.0] * len(table.shares)
            (shares, _, per_second), alike = tables[task.curve]
            last = len(shares) - 1
            cell = min(last, int((at - task.began) * per_second))
            since = min(last, int(task.reached * per_second))
            if since < cell:
                share = shares[cell] / shares[since]
                mean += share
                variance += share * (1 - share)
                alike[since] += share
                alike[cell] -= share
            else:
                mean += 1
        for table, alike in tables.values():
            # Where the curve is wrong, it is for all tasks of such an age alike.
            for depend, doubt in zip(itertools.accumulate(alike), table.doubts, strict=False):
                variance += depend**2 * doubt
        self.mean, self.deviation = mean, math.sqrt(variance)

    def one_more(self) -> None:
        """Another task is watched, which has only just begun."""
        self.mean += 1
