"""Model of how long generations take, learned from the tasks that are polled."""

from __future__ import annotations

import bisect
import math

# Bins of age: from 0.02 s to an hour in steps of 6 %, so 1.8 s wide at 30 s.
_FIRST_EDGE_SECONDS = 0.02
_EDGE_RATIO = 1.06
_BINS = 210
_EDGES = [0.0, *(_FIRST_EDGE_SECONDS * _EDGE_RATIO**index for index in range(_BINS - 1))]
_LOG_EDGE_RATIO = math.log(_EDGE_RATIO)

# Polls after which the weight of an observation has fallen by a factor of e: 25 s at the
# account's limits.
_MEMORY_POLLS = 1_500

# Weights are scaled back above this, long before floats lose the small ones.
_MAX_WEIGHT = 1e9

# Tasks assumed as prior knowledge, with ends as likely between 10 and 20 s as between 100 and
# 200 s. They matter only for ages that no task has reached.
_PRIOR_TASKS = 0.05

# At least this share of tasks survives each bin, so that some are left for later ages.
_MIN_SURVIVING_SHARE = 0.01

# Tasks that must have ended before the model is used.
_MIN_ENDED_TASKS = 30

# Observations after which the model is rebuilt; fewer while few tasks have ended.
_REBUILD_AFTER_POLLS = 25


class LatencyModel:
    """The share of tasks that run longer than an age, updated with each poll.

    A poll shows that a task still runs, or when it ended. Both count for the ages since the poll
    before. This is the product-limit (Kaplan-Meier) estimate for censored times: of the tasks
    observed to reach an age, the share that ended at it. It assumes no shape of the distribution,
    and a slower service shows before its first slow task has ended. Older observations fade.
    """

    def __init__(self) -> None:
        self.ended_count = 0
        self._weight = 1.0  # of the next observation: growing weights let older ones fade
        self._new_polls = 0
        self._ended = [0.0] * _BINS
        # Tasks observed from a bin on, less those observed until it.
        self._entered = [0.0] * _BINS
        self._rebuild()

    @property
    def is_known(self) -> bool:
        """Whether enough tasks have ended to use the model."""
        return self.ended_count >= _MIN_ENDED_TASKS

    @property
    def relative_error(self) -> float:
        """Error of the share of tasks that have ended, relative to it: two standard errors."""
        return 2 / math.sqrt(min(self.ended_count, _MEMORY_POLLS))

    def record_running(self, since: float, age: float) -> None:
        """Record that a task which ran at age `since` still ran at `age`, both in seconds."""
        self._record_poll(since, age)

    def record_end(self, since: float, age: float) -> None:
        """Record that a task which ran at age `since` ended at `age`, both in seconds."""
        self._ended[_bin_of(age)] += self._weight
        self.ended_count += 1
        self._record_poll(since, age)

    def running_share(self, age: float, *, of: float = 0.0) -> float:
        """Return the share of tasks that reach `age`, among those that reach the age `of`."""
        self._refresh()
        reached = self._survival_at(of)
        return min(1.0, self._survival_at(age) / reached) if reached > 0 else 1.0

    def time_to_poll(self, age: float, unnoticed: float) -> float:
        """Return the seconds after which to poll a task that was seen running at `age`.

        The poll is due when the expected time for which the task has been over unnoticed
        reaches `unnoticed` seconds. If ends were equally likely at all ages, this would minimise
        the sum of late seconds and polls, at a price of `unnoticed` seconds for a poll.
        """
        self._refresh()
        running, area = self._survival_at(age), _interpolate(self._area, age)
        if running <= 0:
            return unnoticed

        def expected_lateness(index: int) -> float:
            return _EDGES[index] - age - (self._area[index] - area) / running

        index = bisect.bisect_left(
            range(_BINS), unnoticed, lo=_bin_of(age) + 1, key=expected_lateness
        )
        if index == _BINS:
            return _EDGES[-1]
        low, high = max(age, _EDGES[index - 1]), _EDGES[index]
        before = expected_lateness(index - 1) if low > age else 0.0
        after = expected_lateness(index)
        return low - age + (high - low) * (unnoticed - before) / (after - before)

    def _record_poll(self, since: float, age: float) -> None:
        weight, first, last = self._weight, _bin_of(since), _bin_of(age)
        self._entered[first] += weight
        self._entered[last] -= weight
        self._weight *= 1 + 1 / _MEMORY_POLLS
        self._new_polls += 1

    def _refresh(self) -> None:
        if self._new_polls > min(_REBUILD_AFTER_POLLS, self.ended_count // 10):
            self._rebuild()

    def _rebuild(self) -> None:
        self._new_polls = 0
        if self._weight > _MAX_WEIGHT:
            for values in (self._ended, self._entered):
                values[:] = [value / self._weight for value in values]
            self._weight = 1.0
        prior = _PRIOR_TASKS * self._weight
        running, reached, area = 1.0, 0.0, 0.0
        survival, areas = [1.0], [0.0]
        for index in range(_BINS - 1):
            width = _EDGES[index + 1] - _EDGES[index]
            entered, ended = self._entered[index], self._ended[index]
            # A task that enters or ends within the bin was at risk for half of it on average.
            at_risk = max(reached + (entered + ended) / 2, ended)
            reached += entered
            share = (ended + prior * width / _EDGES[index + 1]) / (at_risk + prior)
            share = min(share, 1 - _MIN_SURVIVING_SHARE)
            left = running * (1 - share)
            area += (running + left) / 2 * width
            running = left
            survival.append(running)
            areas.append(area)
        self._survival, self._area = survival, areas

    def _survival_at(self, age: float) -> float:
        return _interpolate(self._survival, age)


def _bin_of(age: float) -> int:
    if age < _FIRST_EDGE_SECONDS:
        return 0
    return min(_BINS - 2, 1 + int(math.log(age / _FIRST_EDGE_SECONDS) / _LOG_EDGE_RATIO))


def _interpolate(values: list[float], age: float) -> float:
    index = _bin_of(age)
    low, high = _EDGES[index], _EDGES[index + 1]
    share = min(1.0, max(0.0, (age - low) / (high - low)))
    return values[index] + share * (values[index + 1] - values[index])
