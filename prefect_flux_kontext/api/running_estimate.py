"""How many of the tasks we watch still run at the service, as far as can be told."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

    from prefect_flux_kontext.api.latency_curve import LatencyCurve

_ENOUGH = 50
"""Tasks that must have ended before their curve is trusted with submits, and at least as many as
are watched: those that began together are all at the ages of which the least is known."""

_STALE = 0.2
"""Seconds for which a count is used before it is made again."""


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
        deviation: Standard deviation of how many really do.
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
        curve: LatencyCurve | None = None
        shares, per_second, last = [1.0], 0.0, 0
        for task in watched:  # a thousand of them, several times a second
            if task.curve is not curve:
                curve = task.curve
                shares, per_second, last = _table(curve, max(_ENOUGH, len(watched)))
            cell = int((at - task.began) * per_second)
            share = shares[cell] if cell < last else shares[last]
            if task.reached:
                cell = int(task.reached * per_second)
                share /= shares[cell] if cell < last else shares[last]
            if share < 1:
                mean += share
                variance += share * (1 - share)
            else:
                mean += 1
        self.mean, self.deviation = mean, math.sqrt(variance)

    def one_more(self) -> None:
        """Another task is watched, which has only just begun."""
        self.mean += 1


def _table(curve: LatencyCurve | None, enough: int) -> tuple[list[float], float, int]:
    """Shares of tasks that reach an age, cells a second, and the last cell."""
    if curve is None or curve.known < enough:
        return [1.0], 0.0, 0
    shares, per_second = curve.table()
    return shares, per_second, len(shares) - 1
