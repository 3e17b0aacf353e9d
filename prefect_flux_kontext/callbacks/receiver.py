"""The receiver of callbacks: an ASGI application and its server.

A callback is stored before it is answered with 200. Every well-formed request gets the same empty
200, so that the answer does not show whether its token is valid, and nothing is ever echoed.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    asynccontextmanager,
    contextmanager,
    nullcontext,
)
from typing import TYPE_CHECKING

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from prefect_flux_kontext.callbacks.inbox import Callback, Inbox
from prefect_flux_kontext.callbacks.tokens import Attempt, parse_token, validate_secret
from prefect_flux_kontext.client.responses import read_callback
from prefect_flux_kontext.errors import ConfigurationError, LedgerError
from prefect_flux_kontext.ledger.store import RecordStore

if TYPE_CHECKING:
    from pydantic import SecretStr
    from starlette.types import ASGIApp


logger = logging.getLogger(__name__)

__all__ = ["create_receiver"]

_MAX_BODY_BYTES = 64 * 2**10

_BODY_TIMEOUT_SECONDS = 10.0
_STORE_TIMEOUT_SECONDS = 20.0
"""Together at most 30 s, after which the service gives up."""

_REMEMBERED_ATTEMPTS = 20_000
"""Attempts whose repeated callbacks are recognized; bounds the memory."""

_MAX_BODIES_PER_ATTEMPT = 4
"""Different bodies stored for one attempt. A task has one id, so more are an attack or a fault."""

_WARNING_INTERVAL_SECONDS = 60.0
"""Between warnings of wrong tokens, so that a scan does not fill the log."""

_BACKLOG = 4_096
_MAX_CONNECTIONS = 1_000
"""Connections or requests. Any more get a 503, and the service repeats their callbacks."""

_HEAD_TIMEOUT_SECONDS = 10.0
_KEEP_ALIVE_SECONDS = 30
_SHUTDOWN_SECONDS = 5


def create_receiver(inbox: Inbox | str, secret: SecretStr | str | None) -> Starlette:
    """Create a receiver to serve, or to mount in an application of your own under any path.

    The last segment of a request's path is the token, so the receiver works behind a proxy
    whether or not the proxy strips its path prefix.

    Args:
        inbox: Where callbacks are stored: a folder or prefix on any fsspec filesystem. A batch
            reads `OUTPUT/_ledger/callbacks`, unless FLUX_KONTEXT_CALLBACK_INBOX is set.
        secret: The secret with which the batch signs its tokens.

    Raises:
        ConfigurationError: The secret is missing or too short.
    """
    opened = inbox if isinstance(inbox, Inbox) else Inbox(RecordStore(inbox))
    receiver = _Receiver(opened, validate_secret(secret))
    return Starlette(routes=[Route("/{path:path}", receiver.handle, methods=["POST"])])


class _Receiver:
    def __init__(self, inbox: Inbox, secret: bytes) -> None:
        self._inbox = inbox
        self._secret = secret
        self._stored_task_ids: OrderedDict[Attempt, set[str | None]] = OrderedDict()
        self._wrong_tokens = 0
        self._next_warning_at = 0.0

    async def handle(self, request: Request) -> Response:
        """Store the callback of a request and answer it."""
        try:
            async with asyncio.timeout(_BODY_TIMEOUT_SECONDS):
                body = await _read_body(request)
        except TimeoutError:
            return _response_and_close(408)
        except ClientDisconnect:
            return _response_and_close(400)
        if body is None:
            return _response_and_close(413)
        attempt = parse_token(self._secret, request.url.path.rpartition("/")[2])
        if attempt is None:
            self._count_wrong_token()
            return Response()
        try:
            async with asyncio.timeout(_STORE_TIMEOUT_SECONDS):
                await self._store(attempt, read_callback(body))
        except (LedgerError, TimeoutError) as error:
            # The service repeats the callback, and polling finds the result in any case.
            reason = error if str(error) else f"no answer in {_STORE_TIMEOUT_SECONDS:.0f} s"
            logger.warning(
                "A callback could not be stored (the service is asked to repeat it): %s", reason
            )
            return Response(status_code=503)
        return Response()

    async def _store(self, attempt: Attempt, task_id: str | None) -> None:
        stored = self._stored_task_ids.get(attempt, set())
        if task_id in stored or len(stored) >= _MAX_BODIES_PER_ATTEMPT:
            return
        owner, key, number = attempt
        await self._inbox.keep(Callback(owner=owner, key=key, number=number, task_id=task_id))
        self._stored_task_ids.setdefault(attempt, set()).add(task_id)
        if len(self._stored_task_ids) > _REMEMBERED_ATTEMPTS:
            self._stored_task_ids.popitem(last=False)

    def _count_wrong_token(self) -> None:
        self._wrong_tokens += 1
        now = asyncio.get_running_loop().time()
        if now >= self._next_warning_at:
            self._next_warning_at = now + _WARNING_INTERVAL_SECONDS
            logger.warning(
                "Requests with an invalid callback token so far: %d. If the service sent them, "
                "give the receiver and the batch the same FLUX_KONTEXT_CALLBACK_SECRET.",
                self._wrong_tokens,
            )


async def _read_body(request: Request) -> bytes | None:
    """Return the whole body, or None if it is too large."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > _MAX_BODY_BYTES:
            return None
    return bytes(body)


def _response_and_close(status: int) -> Response:
    """Return the answer to a request that is not read to its end."""
    return Response(status_code=status, headers={"Connection": "close"})


def serve(
    app: ASGIApp,
    host: str,
    port: int,
    announce: Callable[[str], None],
    beside: AbstractAsyncContextManager[None] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM, with `beside` entered on the same loop.

    `announce` gets the URL once the server listens; port 0 takes a free one.

    Raises:
        ConfigurationError: The server cannot listen on the address.
    """

    async def serve_until_signal() -> None:
        stopped = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stopped.set)
        async with beside or nullcontext(), serve_in_background(app, host, port) as url:
            announce(url)
            await stopped.wait()

    asyncio.run(serve_until_signal())


@asynccontextmanager
async def serve_in_background(app: ASGIApp, host: str, port: int) -> AsyncIterator[str]:
    """Serve on the running loop while the block runs, and yield the URL; see `serve`."""
    with _open_listener(host, port) as listener:
        server = _Server(
            uvicorn.Config(
                app,
                loop="none",
                http=_TimeoutProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                # Callback URLs are secrets and must not be logged.
                access_log=False,
                proxy_headers=False,
                server_header=False,
                limit_concurrency=_MAX_CONNECTIONS,
                backlog=_BACKLOG,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
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
        # The batch, or `serve`, handles the signals.
        yield


class _TimeoutProtocol(H11Protocol):
    """HTTP protocol that closes a connection if a request's head takes too long to arrive."""

    _close_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._update_timer()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._update_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timer()
        super().connection_lost(exc)

    def _update_timer(self) -> None:
        is_in_progress = self.cycle is not None and not self.cycle.response_complete
        if is_in_progress:
            self._cancel_timer()
        elif self._close_timer is None:
            self._close_timer = self.loop.call_later(_HEAD_TIMEOUT_SECONDS, self.transport.abort)

    def _cancel_timer(self) -> None:
        if self._close_timer is not None:
            self._close_timer.cancel()
            self._close_timer = None


@contextmanager
def _open_listener(host: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is given because asyncio disables Nagle's algorithm only for sockets that name
    # TCP. With it, every reply takes 40 ms longer.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen(_BACKLOG)
        except (OSError, OverflowError) as error:
            raise ConfigurationError(
                f"Cannot listen on {host}:{port}: {error}. Choose another port, or use what "
                "already runs there."
            ) from None
        yield listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
