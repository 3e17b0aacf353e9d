"""Keeping the account's two limits from our side, so that a 429 is the exception.

One governor serves a process and account: every client shares it, whichever thread or event
loop it runs on. So nothing of it belongs to a loop: state is guarded by locks held for a few
instructions, and whoever has to wait sleeps on its own loop.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import threading
from collections import defaultdict

from prefect_flux_kontext.client.limits.concurrency import ConcurrencyLimiter
from prefect_flux_kontext.client.limits.latency_model import LatencyModel
from prefect_flux_kontext.client.limits.rate import RateLimiter
from prefect_flux_kontext.client.retry import RejectionRate, jittered_backoff

logger = logging.getLogger(__name__)

_WEIGHT = 0.05
"""Of one request in the running mean of how long requests take."""


class AccountLimiter:
    """The account's request budget and task gate, what a 429 does to them, and what was learned.

    Args:
        requests_per_minute: The account's limit of requests, submits and polls together.
        concurrent_tasks: The account's limit of tasks running at once.
    """

    def __init__(self, *, requests_per_minute: int, concurrent_tasks: int) -> None:
        self.limits = (requests_per_minute, concurrent_tasks)
        self.requests = RateLimiter(requests_per_minute)
        self.tasks = ConcurrencyLimiter(concurrent_tasks)
        self._curves: defaultdict[str, LatencyModel] = defaultdict(LatencyModel)
        self._refusals = RejectionRate()
        self._streak = 0
        self._paused_until = -math.inf

    def curve(self, mode: str) -> LatencyModel:
        """How long tasks of a mode take, as far as this process has seen."""
        return self._curves[mode]

    def refused(
        self, retry_after: float | None, *, sent_at: float | None = None, submit: bool = False
    ) -> None:
        """A 429 came: all stay away for as long as the service asks, or by backoff.

        Where the service does not say how long, a single refusal holds nobody back but who was
        refused, and that of a submit says nothing of the requests: it may be a task too many.
        Requests that were under way when the first of them was refused are one refusal.

        Args:
            retry_after: Seconds the service asks to wait, where it says so.
            sent_at: Loop time at which the request was sent; None takes the present.
            submit: Whether it was a submit.
        """
        now = asyncio.get_running_loop().time()
        if not submit:
            self._refusals.refused()
        if (now if sent_at is None else sent_at) < self._paused_until:
            seconds = retry_after or 0.0
        elif retry_after or (self._refusals.many and not submit):
            self._streak += 1
            # Zero is no advice: who follows it is refused again at once.
            seconds = retry_after or jittered_backoff(self._streak)
            # Who says how long to wait counts our requests, and does not throw dice.
            if not submit and (self._refusals.some if retry_after else self._refusals.many):
                self.requests.slow_down()
        else:
            return
        if now + seconds > self._paused_until:
            self._paused_until = now + seconds
            self.requests.pause(seconds)
            logger.info("Rate limited by the service (429): requests pause for %.1f s.", seconds)

    def heard(self, *, after: float) -> None:
        """A request was answered, so many seconds after it was sent.

        The next backoff starts small again.
        """
        self._streak = 0
        self._refusals.heard()
        self.requests.speed_up()
        self.tasks.round_trip += _WEIGHT * (after - self.tasks.round_trip)


_limiters: dict[str, AccountLimiter] = {}
_registry_lock = threading.Lock()


def shared_limiter(
    base_url: str, api_key: str, *, requests_per_minute: int, concurrent_tasks: int
) -> AccountLimiter:
    """The process's one governor for an account; with other limits than before, a new one."""
    account = hashlib.sha256(f"{base_url}\n{api_key}".encode()).hexdigest()
    limits = (requests_per_minute, concurrent_tasks)
    with _registry_lock:
        governor = _limiters.get(account)
        if governor is None or governor.limits != limits:
            governor = AccountLimiter(
                requests_per_minute=requests_per_minute, concurrent_tasks=concurrent_tasks
            )
            _limiters[account] = governor
        return governor
