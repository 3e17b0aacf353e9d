"""How long to stay away after a request went wrong."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

LONGEST_RETRY_AFTER = 300.0

_WEIGHT, _SOME, _MANY = 0.1, 0.15, 0.4
"""Of the last ten answers or so, the share of refusals that says that a limit was passed. A
service that refuses one in twenty at random would else slow us down for ever."""


def jittered_backoff(attempt: int, *, base: float = 1.0, longest: float = 30.0) -> float:
    """Seconds to wait before trying again: full jitter below a doubling ceiling.

    Args:
        attempt: How often it went wrong so far, from 1.
        base: The first ceiling, in seconds.
        longest: The ceiling's own ceiling, in seconds.
    """
    ceiling = min(longest, base * 2 ** min(attempt - 1, 16))
    return random.uniform(ceiling / 4, ceiling)


def parse_retry_after(header: str | None) -> float | None:
    """Read a `Retry-After` header, in seconds or as an HTTP date.

    Returns:
        Seconds between 0 and 300, or None where the header is absent or makes no sense.
        More than 300 is cut to it: a mistaken header must not park a batch for days.
    """
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
    return min(seconds, LONGEST_RETRY_AFTER)


class RejectionRate:
    """Tells a run of refusals, which a limit makes, from single ones, which are weather."""

    def __init__(self) -> None:
        self._share = 0.0

    @property
    def many(self) -> bool:
        """Whether of the last answers five in a row, or as good as that, were refusals."""
        return self._share > _MANY

    @property
    def some(self) -> bool:
        """Whether of the last answers two in a row, or as good as that, were refusals."""
        return self._share > _SOME

    def refused(self) -> None:
        """A request was refused with 429."""
        self._share += _WEIGHT * (1 - self._share)

    def heard(self) -> None:
        """A request was answered otherwise."""
        self._share *= 1 - _WEIGHT
