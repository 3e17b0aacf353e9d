"""Futures that threads complete on whichever event loop waits for them."""

from __future__ import annotations

import asyncio


def wake(waiter: asyncio.Future[None], loop: asyncio.AbstractEventLoop) -> None:
    """Complete a future of an event loop, from that loop or from another thread."""
    if loop is _running_loop():
        finish(waiter)
    else:
        loop.call_soon_threadsafe(finish, waiter)


def finish(waiter: asyncio.Future[None]) -> None:
    """Complete a future of the running loop, unless it is done."""
    if not waiter.done():
        waiter.set_result(None)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the running loop, or None if a waiter is discarded after its loop has stopped."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
