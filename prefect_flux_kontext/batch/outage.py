"""POSTs under way: how many there may be, and what happens while the service is down."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from prefect_flux_kontext.client.retry import jittered_backoff
from prefect_flux_kontext.errors import BatchStoppedError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from prefect_flux_kontext.client.client import SubmitOutcome

__all__ = ["PostGate"]

logger = logging.getLogger(__name__)

# After all places were lost, this many single POSTs are tried, each after a probe that the
# service answered. Three in a row are no coincidence: it does not accept submits.
_MAX_TRIALS = 3


class PostGate:
    """Limits POSTs under way, and pauses submitting during an outage.

    A POST with an unknown outcome keeps its place until the service gives a usable reply again.
    So an outage leaves at most as many unknown rows as there are places, plus a few trials. When
    all places are kept, the service is probed by a request that costs nothing.

    Args:
        max_posts: Number of places.
        is_answering: Probes the service.
        patience_seconds: How long to probe before the batch is stopped.
    """

    def __init__(
        self,
        max_posts: int,
        is_answering: Callable[[], Awaitable[bool]],
        *,
        patience_seconds: float,
    ) -> None:
        self._max_posts = max_posts
        self._is_answering = is_answering
        self._patience_seconds = patience_seconds
        self._under_way = 0
        self._kept = 0
        self._unknown_in_a_row = 0
        self._changed = asyncio.Condition()
        self._probing = asyncio.Lock()

    async def acquire(self) -> None:
        """Wait for a place.

        Raises:
            BatchStoppedError: The service gives no usable replies.
        """
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self._has_room or self._is_blocked)
                if self._has_room:
                    self._under_way += 1
                    return
            async with self._probing:
                if self._is_blocked:
                    await self._probe()

    async def release(self, outcome: SubmitOutcome | None) -> None:
        """Give the place back, or keep it if the outcome is unknown."""
        async with self._changed:
            self._under_way -= 1
            if outcome is not None and outcome.is_unknown:
                self._unknown_in_a_row += 1
                self._kept += 1
            elif outcome is not None and outcome.is_usable_reply:
                self._unknown_in_a_row = 0
                self._kept = 0
            self._changed.notify_all()

    @property
    def _has_room(self) -> bool:
        return self._under_way + self._kept < self._max_posts

    @property
    def _is_blocked(self) -> bool:
        """Whether only a probe can free a place."""
        return self._kept > 0 and self._under_way == 0 and not self._has_room

    async def _probe(self) -> None:
        if self._unknown_in_a_row >= self._max_posts + _MAX_TRIALS:
            raise BatchStoppedError(
                f"The service answers, but gave no usable reply to {self._unknown_in_a_row} "
                "submits in a row. Check FLUX_KONTEXT_BASE_URL and the service's state."
            )
        clock = asyncio.get_running_loop().time
        began = clock()
        attempt = 0
        while not await self._is_answering():
            if attempt == 0:
                logger.warning(
                    "No usable reply to %d submits in a row: submitting pauses until the service "
                    "answers again.",
                    self._unknown_in_a_row,
                )
            attempt += 1
            if clock() - began >= self._patience_seconds:
                minutes = self._patience_seconds / 60
                raise BatchStoppedError(
                    f"The service gave no usable reply for {minutes:g} minutes, so the batch was "
                    "stopped. Run it again when the service is well."
                )
            await asyncio.sleep(jittered_backoff(attempt))
        async with self._changed:
            self._kept -= 1
            self._changed.notify_all()
