"""An event loop whose time jumps to the next timer instead of waiting for it.

Everything in the package that waits does so through the running loop (`asyncio.sleep`,
`asyncio.timeout`, `loop.time`), so this loop is the whole time seam: a test that spans
hours of the service takes milliseconds. Work handed to the loop's executor is waited for
in real time, and the virtual clock stands still meanwhile.
"""

import asyncio
import selectors


class _JumpingSelector(selectors.DefaultSelector):
    """Answers at once; when nothing is ready, moves the loop's clock to the next timer."""

    loop: "VirtualTimeLoop"

    def select(self, timeout=None):
        if timeout is None or self.loop.threads_at_work:
            return super().select(timeout if timeout is None else min(timeout, 0.01))
        ready = super().select(0)
        if not ready and timeout > 0:
            self.loop.now += timeout
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """A selector event loop with virtual time, for `anyio_backend`'s `loop_factory`."""

    def __init__(self):
        selector = _JumpingSelector()
        selector.loop = self
        self.now = 1_000_000.0
        self.threads_at_work = 0
        super().__init__(selector)

    def time(self):
        return self.now

    def run_in_executor(self, executor, func, *args):
        self.threads_at_work += 1
        future = super().run_in_executor(executor, func, *args)
        future.add_done_callback(self._thread_done)
        return future

    async def shutdown_default_executor(self, *timeout):
        # It waits for a thread of its own, since Python 3.12 with a time-out.
        self.threads_at_work += 1
        try:
            await super().shutdown_default_executor(*timeout)
        finally:
            self.threads_at_work -= 1

    def _thread_done(self, _future):
        self.threads_at_work -= 1


def on_virtual_time(main):
    """What a coroutine comes to on a loop whose clock jumps."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)
