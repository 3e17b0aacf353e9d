"""How a batch stops: nothing more is submitted, and POSTs under way are still recorded."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

from prefect_flux_kontext.errors import BatchStoppedError

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from prefect_flux_kontext.errors import FluxKontextError

__all__ = ["StopGate"]

_T = TypeVar("_T")


class StopGate:
    """Ends waits for a chance to submit, and protects payments that have begun.

    Attributes:
        reason: Why nothing is submitted any more; None while the batch goes on.
    """

    def __init__(self) -> None:
        self.reason: FluxKontextError | None = None
        self._waits: set[asyncio.Task[Any]] = set()
        self._payments: set[asyncio.Task[Any]] = set()

    def stop(self, reason: FluxKontextError) -> None:
        """Submit nothing from now on. The first reason counts."""
        if self.reason is None:
            self.reason = reason
            for wait in self._waits:
                wait.cancel()

    def check(self) -> None:
        """Raise BatchStoppedError if the batch is stopped."""
        if self.reason is not None:
            raise BatchStoppedError(f"Not submitted: {self.reason}")

    async def interruptible(self, wait: Coroutine[Any, Any, _T]) -> _T:
        """Wait for a chance to submit, until the batch is stopped.

        Raises:
            BatchStoppedError: The batch is stopped.
        """
        task = asyncio.create_task(wait)
        self._waits.add(task)
        task.add_done_callback(self._waits.discard)
        if self.reason is not None:
            task.cancel()
        try:
            return await task
        except asyncio.CancelledError:
            if task.cancelled():
                self.check()
            raise

    async def finish(self, payment: Coroutine[Any, Any, _T]) -> _T:
        """Run a payment to its end, even if the caller is cancelled: its reply is worth money."""
        task = asyncio.create_task(payment)
        self._payments.add(task)
        task.add_done_callback(self._forget)
        return await asyncio.shield(task)

    async def wait(self) -> None:
        """Wait until every payment that has begun is on record."""
        while self._payments:
            await asyncio.wait(self._payments)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._payments.discard(task)
        if not task.cancelled():
            task.exception()  # a cancelled waiter never reads it
