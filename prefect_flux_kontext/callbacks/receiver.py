"""The receiver of callbacks, as an ASGI application: durable first, then 200.

Everything that is well-formed is answered alike, an empty 200, so that nobody learns from the
answer which token is right, and nothing that was sent is ever sent back.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections import OrderedDict
from contextlib import asynccontextmanager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from prefect_flux_kontext.callbacks.inbox import Callback, Inbox
from prefect_flux_kontext.callbacks.tokens import parse_token, validate_secret
from prefect_flux_kontext.client.responses import read_callback
from prefect_flux_kontext.errors import ConfigurationError, LedgerError
from prefect_flux_kontext.ledger.store import RecordStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from contextlib import AbstractAsyncContextManager

    from pydantic import SecretStr
    from starlette.requests import Request

    from prefect_flux_kontext.callbacks.tokens import Attempt

logger = logging.getLogger(__name__)

_LARGEST_BODY = 64 * 2**10
_SLOWEST_BODY = 10.0
_SLOWEST_RECORD = 20.0
"""Seconds for the body and for the record: together no more than the service's 30."""

_REMEMBERED = 20_000
_BODIES_OF_ONE = 4
"""Different bodies kept for one attempt: a task has one id, so whoever sends more is playing."""

_TOLD_EVERY = 60.0


def create_receiver(inbox: Inbox | str, secret: SecretStr | str | None) -> Starlette:
    """A receiver to serve, or to mount in an application of your own under any path.

    The last part of a request's path is the token, so it works behind a proxy whether that
    takes its path prefix away or not.

    Args:
        inbox: Where callbacks are kept: a folder or prefix on any fsspec filesystem. A batch
            looks in `OUTPUT/_ledger/callbacks`, unless FLUX_KONTEXT_CALLBACK_INBOX says where.
        secret: The one that the batch makes its tokens with.

    Raises:
        ConfigurationError: There is no secret, or it is too short.
    """
    kept = inbox if isinstance(inbox, Inbox) else Inbox(RecordStore(inbox))
    receiver = _Receiver(kept, validate_secret(secret))
    return Starlette(routes=[Route("/{path:path}", receiver.take, methods=["POST"])])


class _Receiver:
    def __init__(self, inbox: Inbox, secret: bytes) -> None:
        self._inbox = inbox
        self._secret = secret
        self._seen: OrderedDict[Attempt, set[str | None]] = OrderedDict()
        self._wrong = 0
        self._tell_from = 0.0

    async def take(self, request: Request) -> Response:
        """Answer one request."""
        try:
            async with asyncio.timeout(_SLOWEST_BODY):
                body = await _body(request)
        except TimeoutError:
            return _closing(408)
        except ClientDisconnect:
            return _closing(400)
        if body is None:
            return _closing(413)
        attempt = parse_token(self._secret, request.url.path.rpartition("/")[2])
        if attempt is None:
            self._count_wrong()
            return Response()
        try:
            async with asyncio.timeout(_SLOWEST_RECORD):
                await self._keep(attempt, read_callback(body))
        except (LedgerError, TimeoutError) as error:
            # The service delivers it again; asking it finds the task's end in any case.
            logger.warning("A callback could not be kept: %s", error or "it took too long")
            return Response(status_code=503)
        return Response()

    async def _keep(self, attempt: Attempt, task_id: str | None) -> None:
        known = self._seen.get(attempt, set())
        if task_id in known or len(known) >= _BODIES_OF_ONE:
            return
        owner, key, number = attempt
        await self._inbox.keep(Callback(owner=owner, key=key, number=number, task_id=task_id))
        self._seen.setdefault(attempt, set()).add(task_id)
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)

    def _count_wrong(self) -> None:
        self._wrong += 1
        now = asyncio.get_running_loop().time()
        if now >= self._tell_from:
            self._tell_from = now + _TOLD_EVERY
            logger.warning(
                "%d callbacks so far came with a token that was not made with our secret. If they "
                "are the service's, receiver and batch have different secrets.",
                self._wrong,
            )


async def _body(request: Request) -> bytes | None:
    """The whole body; None where it is too large."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > _LARGEST_BODY:
            return None
    return bytes(body)


def _closing(status: int) -> Response:
    """An answer to a request that is not read to its end."""
    return Response(status_code=status, headers={"Connection": "close"})


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
        async with beside or nullcontext(), serve_in_background(app, host, port) as url:
            announce(url)
            await stopped.wait()

    asyncio.run(until_signalled())


@asynccontextmanager
async def serve_in_background(app: Starlette, host: str, port: int) -> AsyncIterator[str]:
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
