"""Places in the queue of a limiter that serves several threads and event loops."""

from __future__ import annotations

import asyncio


class Waiter:
    """A place in a queue, whose task sleeps on its own event loop until any thread wakes it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.prepare()

    @property
    def is_stranded(self) -> bool:
        """Whether its event loop is closed, so that it can never wake."""
        return self._loop.is_closed()

    def prepare(self) -> None:
        """Count wake-ups from now on; call it with the queue locked, before `sleep`."""
        self._woken: asyncio.Future[None] = self._loop.create_future()

    async def sleep(self, seconds: float) -> None:
        """Sleep until woken, at most this long."""
        timer = self._loop.call_later(seconds, self._finish)
        try:
            await self._woken
        finally:
            timer.cancel()

    def wake(self) -> None:
        """Wake the task; raise RuntimeError if its event loop is closed."""
        try:
            is_own_loop = asyncio.get_running_loop() is self._loop
        except RuntimeError:  # a waiter is discarded after its loop has stopped
            is_own_loop = False
        if is_own_loop:
            self._finish()
        else:
            self._loop.call_soon_threadsafe(self._finish)

    def _finish(self) -> None:
        if not self._woken.done():
            self._woken.set_result(None)
