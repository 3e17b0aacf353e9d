"""The limiter of an account, shared by all of its clients in a process.

Clients of one account may run in several threads and on several event loops. So the limiter
belongs to no event loop: locks, held only briefly, guard its state, and each waiter sleeps on
its own loop.
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
from prefect_flux_kontext.telemetry import observe_slots

logger = logging.getLogger(__name__)

# Weight of one request in the running mean of round trips: about the last twenty count.
_ROUND_TRIP_WEIGHT = 0.05


class AccountLimiter:
    """Keeps requests within the account's limits, so that a 429 is the exception.

    It combines the request limit, the limit of concurrent tasks, the reactions to a 429 and the
    latency models of the modes.
    """

    def __init__(self, *, requests_per_minute: int, concurrent_tasks: int) -> None:
        self.limits = (requests_per_minute, concurrent_tasks)  # as given
        self.requests = RateLimiter(requests_per_minute)
        self.tasks = ConcurrencyLimiter(concurrent_tasks)
        self._latency_models: defaultdict[str, LatencyModel] = defaultdict(LatencyModel)
        self._rejection_rate = RejectionRate()
        self._pauses_in_a_row = 0
        self._paused_until = -math.inf
        observe_slots(self.tasks)

    def resize(self, *, requests_per_minute: int, concurrent_tasks: int) -> None:
        """Change the limits, which are a share of the account's."""
        self.requests.resize(requests_per_minute)
        self.tasks.resize(concurrent_tasks)

    def latency_model(self, mode: str) -> LatencyModel:
        """Return the model of how long tasks of a mode take, as observed by this process."""
        return self._latency_models[mode]

    def record_rejection(
        self, retry_after: float | None, *, sent_at: float | None = None, is_submit: bool = False
    ) -> None:
        """React to a 429: pause all requests for as long as the service asks, or with backoff.

        Without `Retry-After`, a single rejection pauses no other request. The rejection of a
        submit then says nothing about the request limit, because there may be too many tasks.
        Rejections of requests that were in flight at the first rejection count as one.
        """
        now = asyncio.get_running_loop().time()
        sent_at = now if sent_at is None else sent_at
        if not is_submit or self.is_request_limit(retry_after):
            self._rejection_rate.record_rejection()
            if retry_after or self._rejection_rate.high:
                self.requests.meet_limit(sent_at=sent_at)
        if sent_at < self._paused_until:
            seconds = retry_after or 0.0
        elif retry_after or (self._rejection_rate.high and not is_submit):
            self._pauses_in_a_row += 1
            # A Retry-After of 0 is ignored: a request sent immediately is rejected again.
            seconds = retry_after or jittered_backoff(self._pauses_in_a_row)
        else:
            return
        if now + seconds > self._paused_until:
            self._paused_until = now + seconds
            self.requests.pause(seconds)
            logger.info("Rate limited by the service (429): requests pause for %.1f s.", seconds)

    def is_request_limit(self, retry_after: float | None) -> bool:
        """Return whether the 429 of a submit is about requests, and so not about slots."""
        return bool(retry_after) and self.requests.is_at_limit()

    def record_success(self, *, round_trip: float) -> None:
        """Record a reply other than 429, after seconds. The next backoff starts small again."""
        self._pauses_in_a_row = 0
        self._rejection_rate.record_success()
        self.requests.record_answer()
        self.tasks.round_trip += _ROUND_TRIP_WEIGHT * (round_trip - self.tasks.round_trip)


_limiters: dict[str, AccountLimiter] = {}
_limiters_lock = threading.Lock()


def shared_limiter(
    base_url: str, api_key: str, *, requests_per_minute: int, concurrent_tasks: int
) -> AccountLimiter:
    """Return the process's limiter of an account. Changed limits create a new one."""
    account = hashlib.sha256(f"{base_url}\n{api_key}".encode()).hexdigest()
    limits = (requests_per_minute, concurrent_tasks)
    with _limiters_lock:
        limiter = _limiters.get(account)
        if limiter is None or limiter.limits != limits:
            limiter = AccountLimiter(
                requests_per_minute=requests_per_minute, concurrent_tasks=concurrent_tasks
            )
            _limiters[account] = limiter
        return limiter
