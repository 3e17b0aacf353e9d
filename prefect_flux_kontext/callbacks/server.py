"""Serving the receiver over HTTP: in the foreground, or on the loop of a running batch."""

from __future__ import annotations

import asyncio
import signal
import socket
from contextlib import asynccontextmanager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from prefect_flux_kontext.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from contextlib import AbstractAsyncContextManager

    from starlette.applications import Starlette

_BACKLOG = 4_096
_MOST_AT_ONCE = 1_000
"""Connections or requests; more are told 503, and the service delivers theirs again."""

_SLOWEST_HEAD = 10.0
_KEEP_ALIVE_SECONDS = 30
_LAST_REQUESTS_SECONDS = 5


def serve(
    app: Starlette,
    host: str,
    port: int,
    announce: Callable[[str], None],
    beside: AbstractAsyncContextManager[None] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        app: The receiver.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        announce: Called with the URL as soon as it can be reached.
        beside: What runs on the same loop meanwhile.

    Raises:
        ConfigurationError: The address cannot be listened on.
    """

    async def until_signalled() -> None:
        stopped = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stopped.set)
        async with beside or nullcontext(), served(app, host, port) as url:
            announce(url)
            await stopped.wait()

    asyncio.run(until_signalled())


@asynccontextmanager
async def served(app: Starlette, host: str, port: int) -> AsyncIterator[str]:
    """Serve on the running loop while the block runs; yields the URL.

    Raises:
        ConfigurationError: The address cannot be listened on.
    """
    with _listening(host, port) as listener:
        server = _Server(
            uvicorn.Config(
                app,
                loop="none",
                http=_Impatient,
                ws="none",
                lifespan="off",
                log_config=None,
                # The URLs of callbacks are secrets, so no line tells of a request.
                access_log=False,
                proxy_headers=False,
                server_header=False,
                limit_concurrency=_MOST_AT_ONCE,
                backlog=_BACKLOG,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=_LAST_REQUESTS_SECONDS,
            )
        )
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield _url(listener)
        finally:
            server.should_exit = True
            await asyncio.shield(serving)


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        # Signals are the batch's, or are handled above.
        yield


class _Impatient(H11Protocol):
    """Closes a connection whose request does not begin in time, or drips in line by line."""

    _closing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def _watch(self) -> None:
        under_way = self.cycle is not None and not self.cycle.response_complete
        if under_way:
            self._unwatch()
        elif self._closing is None:
            self._closing = self.loop.call_later(_SLOWEST_HEAD, self.transport.abort)

    def _unwatch(self) -> None:
        if self._closing is not None:
            self._closing.cancel()
            self._closing = None


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named as TCP, because asyncio switches Nagle's delay off only where it says so: without
    # it every reply takes 40 ms longer.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen(_BACKLOG)
        except (OSError, OverflowError) as error:
            raise ConfigurationError(
                f"Callbacks cannot be received on {host}:{port}: {error}. Choose another port, or "
                "let a receiver that runs already take them."
            ) from None
        yield listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
