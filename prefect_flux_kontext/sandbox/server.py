"""The sandbox's HTTP server, in the foreground or in a thread."""

from __future__ import annotations

import asyncio
import signal
import socket
import struct
import threading
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import uvicorn
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from prefect_flux_kontext.sandbox.app import Sandbox
from prefect_flux_kontext.sandbox.faults.exchange import CONNECTION
from prefect_flux_kontext.sandbox.settings import SandboxSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from starlette.applications import Starlette
    from starlette.types import ASGIApp, Receive, Scope, Send

    from prefect_flux_kontext.sandbox.faults.plan import FaultPlan

_BACKLOG = 4_096
# Longer than clients keep idle connections. When the server closes one during a POST, the
# client cannot know whether it was accepted.
_KEEP_ALIVE_SECONDS = 75
_GRACEFUL_SHUTDOWN_SECONDS = 2


def serve(
    settings: SandboxSettings,
    host: str,
    port: int,
    announce: Callable[[str], None] | None = None,
    plan: FaultPlan | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM; `announce` gets the base URL. Port 0 is a free one."""
    with _listen(host, port) as listener:
        if announce:
            announce(_url(listener))
        asyncio.run(_serve_until_signalled(_server(Sandbox(settings, plan).app), listener))


@contextmanager
def running_sandbox(
    settings: SandboxSettings | None = None, port: int = 0, plan: FaultPlan | None = None
) -> Iterator[Sandbox]:
    """Serve on loopback from a thread until the context ends. Port 0 is a free one."""
    sandbox = Sandbox(settings or SandboxSettings(), plan)
    with _listen("127.0.0.1", port) as listener:
        sandbox.url = _url(listener)
        server = _server(sandbox.app)
        thread = threading.Thread(
            target=lambda: asyncio.run(server.serve(sockets=[listener])), name="sandbox"
        )
        # No wait for the start: the socket listens already, so the kernel queues connections.
        thread.start()
        try:
            yield sandbox
        finally:
            server.should_exit = True
            thread.join()


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        # The base method raises the signal again after a clean stop, which ends in a traceback.
        yield


class _Protocol(H11Protocol):
    """HTTP protocol with an ASGI extension that ends the connection of a request."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        control = {"reset": partial(_reset, transport), "close": transport.close}
        inner = self.app

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            scope["extensions"] = {**scope.get("extensions", {}), CONNECTION: control}
            await inner(scope, receive, send)

        self.app = app


def _reset(transport: asyncio.Transport) -> None:
    if transport.is_closing():
        return  # the client disconnected first
    # A socket closed with a linger time of 0 sends a reset.
    linger = struct.pack("ii", 1, 0)
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    transport.abort()


def _is_own_host(host: str) -> bool:
    """Whether a host is an address or a local name, which no web page elsewhere can have."""
    name = urlsplit(f"//{host}").hostname or ""
    return ":" in name or name.rpartition(".")[2].isdecimal() or "." not in name


def _refuse_foreign_pages(app: ASGIApp) -> ASGIApp:
    """Refuse requests that a web page made: a foreign origin, or a name that leads here."""

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            host, origin = headers.get("host", ""), headers.get("origin")
            if not _is_own_host(host) or origin not in (None, f"http://{host}"):
                refusal = PlainTextResponse("Foreign host or origin.", 403)
                await refusal(scope, receive, send)
                return
        await app(scope, receive, send)

    return guarded


def _server(app: Starlette) -> _Server:
    config = uvicorn.Config(
        _refuse_foreign_pages(app),
        loop="asyncio",
        http=_Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_GRACEFUL_SHUTDOWN_SECONDS,
    )
    return _Server(config)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is explicit because asyncio disables Nagle's algorithm only for sockets
    # marked as TCP. Otherwise every reply takes 40 ms longer.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def _serve_until_signalled(server: _Server, listener: socket.socket) -> None:
    def stop() -> None:
        server.should_exit = True

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    await server.serve(sockets=[listener])
