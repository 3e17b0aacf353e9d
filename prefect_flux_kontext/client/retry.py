"""Retry delays, and the rate at which the service rejects requests with 429."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

# A wrong header must not pause a batch for days.
MAX_RETRY_AFTER_SECONDS = 300.0

# Weight of one reply in the running share of rejections: about the last ten replies count.
_REPLY_WEIGHT = 0.1

# Two rejections in a row exceed the first share, five the second. A service that rejects one
# request in twenty at random exceeds neither for long, and so does not slow the client down.
_ELEVATED_SHARE = 0.15
_HIGH_SHARE = 0.4


def jittered_backoff(attempt: int, *, base: float = 1.0, longest: float = 30.0) -> float:
    """Return the seconds to wait after this number of failed attempts.

    The ceiling doubles with each attempt; the delay is random between a quarter of the ceiling
    and the ceiling.
    """
    ceiling = min(longest, base * 2 ** min(attempt - 1, 16))
    return random.uniform(ceiling / 4, ceiling)


def parse_retry_after(header: str | None) -> float | None:
    """Return the seconds, 0 to 300, of a valid `Retry-After` header: a number or an HTTP date."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            moment = parsedate_to_datetime(header)
        except (ValueError, OverflowError):
            return None
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        seconds = (moment - datetime.now(UTC)).total_seconds()
    if not seconds >= 0:  # negative, or not a number
        return None
    return min(seconds, MAX_RETRY_AFTER_SECONDS)


class RejectionRate:
    """The share of recent requests that the service rejected with 429.

    A limit rejects several requests in a row; single rejections may be random.
    """

    def __init__(self) -> None:
        self._share = 0.0

    @property
    def elevated(self) -> bool:
        """Whether about two requests in a row were rejected."""
        return self._share > _ELEVATED_SHARE

    @property
    def high(self) -> bool:
        """Whether about five requests in a row were rejected."""
        return self._share > _HIGH_SHARE

    def record_rejection(self) -> None:
        """Count a request that was rejected with 429."""
        self._share += _REPLY_WEIGHT * (1 - self._share)

    def record_success(self) -> None:
        """Count a request with any other reply."""
        self._share *= 1 - _REPLY_WEIGHT
