"""How a batch stops: nothing more is submitted, and POSTs under way are still recorded.

A batch may be stopped by an error, by cancellation (a Prefect time limit, a crash of the caller)
or by a signal. In each case the replies to POSTs under way are awaited first, for a limited time,
because each of them may name a paid task.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import anyio

from prefect_flux_kontext.errors import BatchStoppedError

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

    from prefect_flux_kontext.errors import FluxKontextError

__all__ = ["StopGate", "stop_on_signals"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopGate:
    """Ends waits for a chance to submit, and protects payments that have begun.

    Args:
        patience_seconds: How long to wait for replies to POSTs under way.

    Attributes:
        reason: Why nothing is submitted any more; None while the batch goes on.
    """

    def __init__(self, patience_seconds: float = 60.0) -> None:
        self._patience_seconds = patience_seconds
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
        """Wait until every payment that has begun is on record.

        Cancellation does not end the wait. It is raised afterwards.
        """
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._patience_seconds
        cancelled: asyncio.CancelledError | None = None
        # The scope holds off anyio's cancellation, which Prefect's time limits use.
        with anyio.CancelScope(shield=True):
            while self._payments and clock() < deadline:
                try:
                    await asyncio.wait(self._payments, timeout=deadline - clock())
                except asyncio.CancelledError as error:
                    cancelled = error
        if self._payments:
            logger.error(
                "%d submits had no reply within %g seconds. Their rows are unknown.",
                len(self._payments),
                self._patience_seconds,
            )
        if cancelled is not None:
            raise cancelled

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._payments.discard(task)
        if not task.cancelled():
            task.exception()  # a cancelled waiter never reads it


@contextmanager
def stop_on_signals(gate: StopGate) -> Iterator[None]:
    """Delay SIGTERM and SIGINT in the block until every payment that has begun is on record.

    The signal then takes its usual effect. Where SIGTERM would end the process at once, the
    current task is cancelled instead, so that reports are written. Signals reach the main thread
    only, so this does nothing in other threads.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop, running = asyncio.get_running_loop(), asyncio.current_task()
    passing: list[asyncio.Task[None]] = []

    def handle(number: int, _frame: object) -> None:
        loop.call_soon_threadsafe(begin, number)

    def begin(number: int) -> None:
        name = signal.Signals(number).name
        gate.stop(BatchStoppedError(f"The run received {name}."))
        if not passing:
            passing.append(asyncio.create_task(pass_on(number)))
        else:
            logger.warning("%s: still waiting for replies to submits under way.", name)

    async def pass_on(number: int) -> None:
        await gate.wait()
        restore()
        if handlers[number] == signal.SIG_DFL and running is not None:
            running.cancel()
        else:
            # Another thread sends it: an exception that is raised by the signal's handler must not
            # be caught by the task or callback that is running.
            await asyncio.to_thread(os.kill, os.getpid(), number)

    def restore() -> None:
        for number, handler in handlers.items():
            if signal.getsignal(number) is handle:
                signal.signal(number, handler)

    handlers = {
        # None stands for a handler that Python cannot put back.
        int(number): signal.signal(number, handle) or signal.SIG_DFL
        for number in _SIGNALS
        if signal.getsignal(number) != signal.SIG_IGN  # as of background jobs of a shell
    }
    try:
        yield
    finally:
        restore()
