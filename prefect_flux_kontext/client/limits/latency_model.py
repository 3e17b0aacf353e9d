"""How long generations take, learned from the tasks that are watched."""

from __future__ import annotations

import bisect
import itertools
import math
from typing import NamedTuple

_FIRST, _RATIO, _BINS = 0.02, 1.06, 210
"""Ages from 0.02 s to an hour, in steps of 6 %: 1.8 s wide at 30 s."""

_MEMORY = 1_500
"""Looks after which what was learned has faded e-fold: 25 s at the account's limit."""

_PRIOR = 0.05
"""Tasks we pretend to have seen, with ends as likely at 10 to 20 s as at 100 to 200 s. They
count only for ages that no task has reached."""

_LEFT = 0.01
"""Least share of tasks that is taken to survive a bin: the ages after it must have some."""

_CELLS = 400
_FEW, _RARE = 0.1, 0.002
_REBUILD_AFTER = 25


class SurvivalTable(NamedTuple):
    """A curve as equal stretches of age; what is older than the last, nothing can be told of.

    Attributes:
        shares: Of all tasks, those that reach the middle of each stretch.
        doubts: Variances of the error of each share's ratio to the one before, relative to it.
        per_second: Stretches a second.
    """

    shares: list[float]
    doubts: list[float]
    per_second: float


class LatencyModel:
    """The share of tasks that run longer than an age, kept up to date look by look.

    What a look tells is that a task still ran, or when it ended. Both count for the ages it
    was at since the look before, which is the product-limit estimate for such half-known times:
    how many ended at an age, of those that were seen to reach it. It assumes no shape, and a
    service that has slowed down shows before its first slow task has ended. What is older fades.

    Attributes:
        known: Tasks seen to end so far.
    """

    def __init__(self) -> None:
        self.known = 0
        self._weight = 1.0
        self._new = 0
        self._ended = [0.0] * _BINS
        self._entered = [
            0.0
        ] * _BINS  # tasks that were watched from here on, less those until here
        self._table: SurvivalTable | None = None
        self._rebuild()

    def still_running(self, since: float, age: float) -> None:
        """A task that ran at the age of `since` seconds still did at `age` seconds."""
        self._reached(since, age)

    def ended(self, since: float, age: float) -> None:
        """A task that ran at the age of `since` seconds ended at `age` seconds."""
        self._ended[_bin(age)] += self._weight
        self.known += 1
        self._reached(since, age)

    def running_share(self, age: float, *, of: float = 0.0) -> float:
        """Of the tasks that reach the age `of`, the share that reaches `age` seconds."""
        self._refresh()
        reached = self._survival_at(of)
        return min(1.0, self._survival_at(age) / reached) if reached > 0 else 1.0

    def time_to_look(self, age: float, patience: float) -> float:
        """Seconds after which a task that runs at `age` is worth a look.

        It is when the seconds for which it has ended and we do not know it are expected to be
        `patience`. Were ends equally likely at all ages, this is the interval at which a look
        costs as much as what is late for want of one, if `patience` is the price of a look.
        """
        self._refresh()
        running, area = self._survival_at(age), self._area_at(age)
        if running <= 0:
            return patience

        def late(index: int) -> float:
            return _EDGES[index] - age - (self._area[index] - area) / running

        index = bisect.bisect_left(range(_BINS), patience, lo=_bin(age) + 1, key=late)
        if index == _BINS:
            return _EDGES[-1]
        low, high = max(age, _EDGES[index - 1]), _EDGES[index]
        before = late(index - 1) if low > age else 0.0
        return low - age + (high - low) * (patience - before) / (late(index) - before)

    def table(self) -> SurvivalTable:
        """The curve as equal stretches of age, up to where few are left or none was seen."""
        self._refresh()
        if self._table is None:
            end = min(self._age_at(_RARE), 2 * self._age_at(_FEW), self._oldest)
            middles = [(cell + 0.5) * end / _CELLS for cell in range(_CELLS)]
            doubts = [_between(self._doubt, age) for age in middles]
            self._table = SurvivalTable(
                shares=[self._survival_at(age) for age in middles],
                doubts=[after - before for before, after in itertools.pairwise(doubts)],
                per_second=_CELLS / end if end else 0.0,
            )
        return self._table

    def _reached(self, since: float, age: float) -> None:
        weight, first, last = self._weight, _bin(since), _bin(age)
        self._entered[first] += weight
        self._entered[last] -= weight
        self._weight *= 1 + 1 / _MEMORY
        self._new += 1

    def _refresh(self) -> None:
        if self._new > min(_REBUILD_AFTER, self.known // 10):
            self._rebuild()

    def _rebuild(self) -> None:
        self._new = 0
        if self._weight > 1e9:  # noqa: PLR2004 - long before floats lose the small ones
            for values in (self._ended, self._entered):
                values[:] = [value / self._weight for value in values]
            self._weight = 1.0
        prior = _PRIOR * self._weight
        running, reached, area, doubt = 1.0, 0.0, 0.0, 0.0
        survival, areas, doubts = [1.0], [0.0], [0.0]
        self._oldest = 0.0
        for index in range(_BINS - 1):
            width = _EDGES[index + 1] - _EDGES[index]
            came, ended = self._entered[index], self._ended[index]
            # Who came or went within the bin was there for half of it, on the average.
            there = max(reached + (came + ended) / 2, ended)
            reached += came
            share = (ended + prior * width / _EDGES[index + 1]) / (there + prior)
            share = min(share, 1 - _LEFT)
            left = running * (1 - share)
            doubt += share / (1 - share) / (there / self._weight + _PRIOR)
            if there >= self._weight:
                self._oldest = _EDGES[index + 1]
            area += (running + left) / 2 * width
            running = left
            survival.append(running)
            areas.append(area)
            doubts.append(doubt)
        self._survival, self._area, self._doubt = survival, areas, doubts
        self._table = None

    def _age_at(self, share: float) -> float:
        """The age that no more than this share of tasks reaches."""
        index = bisect.bisect_left(self._survival, -share, hi=_BINS - 1, key=lambda left: -left)
        return _EDGES[index]

    def _survival_at(self, age: float) -> float:
        return _between(self._survival, age)

    def _area_at(self, age: float) -> float:
        return _between(self._area, age)


_EDGES = [0.0, *(_FIRST * _RATIO**index for index in range(_BINS - 1))]
_LOG_RATIO = math.log(_RATIO)


def _bin(age: float) -> int:
    if age < _FIRST:
        return 0
    return min(_BINS - 2, 1 + int(math.log(age / _FIRST) / _LOG_RATIO))


def _between(values: list[float], age: float) -> float:
    index = _bin(age)
    low, high = _EDGES[index], _EDGES[index + 1]
    share = min(1.0, max(0.0, (age - low) / (high - low)))
    return values[index] + share * (values[index + 1] - values[index])
