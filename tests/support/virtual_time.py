"""An event loop whose time jumps to the next timer instead of waiting for it.

The package waits only through the running loop (`asyncio.sleep`, `asyncio.timeout`,
`loop.time`), so replacing the loop replaces time: a test that spans hours takes milliseconds.
While work runs in the loop's executor, the loop waits in real time and its clock stands still.
"""

import asyncio
import selectors


class _JumpingSelector(selectors.DefaultSelector):
    """Selector that moves the loop's clock to the next timer when nothing is ready."""

    loop: "VirtualTimeLoop"

    def select(self, timeout=None):
        if timeout is None or self.loop.busy_threads:
            return super().select(timeout if timeout is None else min(timeout, 0.01))
        ready = super().select(0)
        if not ready and timeout > 0:
            self.loop.now += timeout
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Selector event loop with virtual time, for `anyio_backend`'s `loop_factory`."""

    def __init__(self):
        selector = _JumpingSelector()
        selector.loop = self
        self.now = 1_000_000.0
        self.busy_threads = 0
        super().__init__(selector)

    def time(self):
        return self.now

    def run_in_executor(self, executor, func, *args):
        self.busy_threads += 1
        future = super().run_in_executor(executor, func, *args)
        future.add_done_callback(self._thread_done)
        return future

    async def shutdown_default_executor(self, *timeout):
        # It waits for a thread of its own; since Python 3.12 with a timeout.
        self.busy_threads += 1
        try:
            await super().shutdown_default_executor(*timeout)
        finally:
            self.busy_threads -= 1

    def _thread_done(self, _future):
        self.busy_threads -= 1


def run_in_virtual_time(main):
    """Run a coroutine on a loop with virtual time and return its result."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)
