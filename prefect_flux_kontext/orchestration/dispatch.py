"""Tasks and methods that sync and async flows call in the same way, by context.

Prefect runs an async task in a sync flow only through `.submit` and `.map`: a plain call returns a
coroutine. These tasks run it there.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, ParamSpec, TypeVar

from prefect import Task
from prefect.context import FlowRunContext, TaskRunContext
from prefect.exceptions import TerminationSignal
from prefect.utilities.asyncutils import run_coro_as_sync

P = ParamSpec("P")
R = TypeVar("R")


class _DispatchedTask(Task[P, R]):
    """An async task that returns its result to sync callers, and a coroutine to async ones."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the task.

        Raises:
            TypeError: An argument is a coroutine that was not awaited.
        """
        for value in (*args, *kwargs.values()):
            if inspect.iscoroutine(value):
                value.close()
                raise TypeError(
                    f"An argument of {self.name} is a coroutine. Write `await` before the call "
                    "that made it."
                )
        return _run_by_context(super().__call__(*args, **kwargs))

    def with_options(self, **options: Any) -> Task[P, R]:
        """Return a copy with other options, as Prefect's own method does."""
        changed = super().with_options(**options)
        changed.__class__ = type(self)
        return changed


def dispatched_task(**options: Any) -> Callable[[Callable[P, R]], Task[P, R]]:
    """Decorate an async function as `prefect.task` does, for sync and async callers."""
    return lambda function: _DispatchedTask(fn=function, **options)


def dispatched(function: Callable[P, R]) -> Callable[P, Any]:
    """Make an async function return its result to sync callers, and a coroutine to async ones."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Any:
        return _run_by_context(function(*args, **kwargs))

    return call


def _run_by_context(running: Any) -> Any:
    return running if _is_called_asynchronously() else _run_in_loop(running)


def _run_in_loop(running: Coroutine[Any, Any, R]) -> R:
    """Run a coroutine in Prefect's event loop, which has a thread of its own.

    Signals are raised here, in the main thread. The coroutine is then cancelled and awaited,
    because it may be waiting for the reply to a paid submit.
    """
    begun: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any] | None]] = Future()
    ended = threading.Event()

    async def run() -> R:
        begun.set_result((asyncio.get_running_loop(), asyncio.current_task()))
        try:
            return await running
        finally:
            ended.set()

    try:
        return run_coro_as_sync(run())
    finally:
        while begun.done() and not ended.is_set():
            loop, task = begun.result()
            if task is not None:
                loop.call_soon_threadsafe(task.cancel)
            with contextlib.suppress(KeyboardInterrupt, TerminationSignal):  # a repeated signal
                ended.wait()


def _is_called_asynchronously() -> bool:
    """Whether the nearest task or flow is async; outside of both, whether a loop is running."""
    if task_run := TaskRunContext.get():
        return bool(task_run.task.isasync)
    flow_run = FlowRunContext.get()
    if flow_run is not None and flow_run.flow is not None:
        return bool(flow_run.flow.isasync)
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
