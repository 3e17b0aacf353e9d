"""A limit of the account that the service's rejections may show to be lower than configured."""

from __future__ import annotations

import math

# Seconds for which a limit that was met does not grow: at first, and at most. They double each
# time the limit is met again at about the same count.
_MIN_HOLD_SECONDS = 10.0
_MAX_HOLD_SECONDS = 120.0

# Counts that differ by less than this share, or by one, are taken as the same limit.
_SAME_SHARE = 0.05


class LearnedLimit:
    """The configured limit, or a lower one at which the service has rejected requests."""

    def __init__(self, configured: int) -> None:
        self._configured = configured
        self._limit = float(configured)
        self._met = math.inf  # count at which a limit was last met
        self._met_at = -math.inf
        self._hold = _MIN_HOLD_SECONDS

    @property
    def value(self) -> int:
        """The limit as far as it is known, at least 1."""
        return max(1, round(self._limit))

    def is_near(self, count: float) -> bool:
        """Return whether a count is about that at which a limit was last met, or above it."""
        return count >= (1 - _SAME_SHARE) * self._met - 1

    def meet(self, count: float, now: float, *, sent_at: float) -> None:
        """Record that the service rejected a request, sent at a loop time, beyond a count."""
        if sent_at <= self._met_at:  # it was in flight then, so it says nothing new
            return
        if self.is_near(count) and count <= (1 + _SAME_SHARE) * self._met + 1:
            self._hold = min(_MAX_HOLD_SECONDS, 2 * self._hold)
            count = (self._met + count) / 2
        else:
            self._hold = _MIN_HOLD_SECONDS
        self._met_at = now
        self._limit = self._met = min(count, self._configured)

    def reconfigure(self, configured: int) -> None:
        """Change the configured limit; one that was met below it stays."""
        is_lowered = self._limit < self._configured
        self._limit = float(min(self._limit, configured) if is_lowered else configured)
        self._configured = configured

    def accept(self, count: float, *, sent_at: float) -> None:
        """Record that the service accepted a request, so that a count is within the limit."""
        if sent_at <= self._met_at:
            self._limit = max(self._limit, min(count, self._configured))

    def grow(self, step: float, now: float) -> None:
        """Raise a lowered limit, unless it was met recently."""
        if now >= self._met_at + self._hold:
            self._limit = min(self._limit + step, self._configured)
