"""Waking those who wait for a slot or a request, on whichever event loop they wait."""

from __future__ import annotations

import asyncio


def wake(waiter: asyncio.Future[None], loop: asyncio.AbstractEventLoop) -> None:
    """Finish what is waited for, from this loop or another's thread.

    Raises:
        RuntimeError: Its loop is closed.
    """
    if loop is _running_loop():
        finish(waiter)
    else:
        loop.call_soon_threadsafe(finish, waiter)


def finish(waiter: asyncio.Future[None]) -> None:
    """Finish what is waited for on this loop, unless it has been."""
    if not waiter.done():
        waiter.set_result(None)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    """The loop that runs here; none where what waited is thrown away after its loop has ended."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
