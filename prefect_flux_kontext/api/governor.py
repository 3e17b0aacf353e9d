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

from prefect_flux_kontext.api.backoff import jittered
from prefect_flux_kontext.api.request_budget import RequestBudget
from prefect_flux_kontext.api.task_gate import TaskGate

logger = logging.getLogger(__name__)

_WEIGHT, _TOO_MANY_REFUSED = 0.1, 0.3
"""Of the last ten answers or so, the share of refusals that says that our rate is too high. A
service that refuses one in twenty at random would else slow us down for ever."""


class Governor:
    """The account's request budget and task gate, and what a 429 does to them.

    Args:
        requests_per_minute: The account's limit of requests, submits and polls together.
        concurrent_tasks: The account's limit of tasks running at once.
    """

    def __init__(self, *, requests_per_minute: int, concurrent_tasks: int) -> None:
        self.limits = (requests_per_minute, concurrent_tasks)
        self.requests = RequestBudget(requests_per_minute)
        self.tasks = TaskGate(concurrent_tasks)
        self._streak = 0
        self._refused_share = 0.0
        self._paused_until = -math.inf

    def refused(
        self,
        retry_after: float | None,
        *,
        sent_at: float | None = None,
        too_many_requests: bool = False,
    ) -> None:
        """A 429 came: all stay away for as long as the service asks, or by backoff.

        Requests that were under way when the first of them was refused are one refusal.

        Args:
            retry_after: Seconds the service asks to wait, where it says so.
            sent_at: Loop time at which the request was sent; None takes the present.
            too_many_requests: Whether it can only be the limit of requests, not that of tasks.
        """
        now = asyncio.get_running_loop().time()
        if (now if sent_at is None else sent_at) < self._paused_until:
            seconds = retry_after or 0.0
        else:
            self._streak += 1
            self._refused_share += _WEIGHT * (1 - self._refused_share)
            # Zero is no advice: who follows it is refused again at once.
            seconds = retry_after or jittered(self._streak)
            if too_many_requests and self._refused_share > _TOO_MANY_REFUSED:
                self.requests.slow_down()
        if now + seconds > self._paused_until:
            self._paused_until = now + seconds
            self.requests.pause(seconds)
            logger.info("Rate limited by the service (429): requests pause for %.1f s.", seconds)

    def heard(self) -> None:
        """A request was answered: the next backoff starts small again."""
        self._streak = 0
        self._refused_share *= 1 - _WEIGHT
        self.requests.speed_up()


_governors: dict[str, Governor] = {}
_registry_lock = threading.Lock()


def shared_governor(
    base_url: str, api_key: str, *, requests_per_minute: int, concurrent_tasks: int
) -> Governor:
    """The process's one governor for an account; with other limits than before, a new one."""
    account = hashlib.sha256(f"{base_url}\n{api_key}".encode()).hexdigest()
    limits = (requests_per_minute, concurrent_tasks)
    with _registry_lock:
        governor = _governors.get(account)
        if governor is None or governor.limits != limits:
            governor = Governor(
                requests_per_minute=requests_per_minute, concurrent_tasks=concurrent_tasks
            )
            _governors[account] = governor
        return governor
