"""Serving the sandbox over HTTP: in the foreground, or in a thread beside a test."""

from __future__ import annotations

import asyncio
import signal
import socket
import struct
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from prefect_flux_kontext.sandbox.app import Sandbox
from prefect_flux_kontext.sandbox.faults.exchange import CONNECTION
from prefect_flux_kontext.sandbox.settings import SandboxSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from starlette.applications import Starlette
    from starlette.types import Receive, Scope, Send

    from prefect_flux_kontext.sandbox.faults.injector import ActiveFaults
    from prefect_flux_kontext.sandbox.faults.plan import FaultPlan
    from prefect_flux_kontext.sandbox.service import Service

_BACKLOG = 4_096
# Longer than any client's pool keeps an idle connection: one that the server closes under a
# POST leaves the client in doubt whether it has just paid.
_KEEP_ALIVE_SECONDS = 75
_LAST_REQUESTS_SECONDS = 2


@dataclass(frozen=True)
class RunningSandbox:
    """A sandbox that is being served by another thread.

    Attributes:
        url: Its base URL, without a slash at the end.
        settings: How it behaves.
        service: Its state machine; `service.bill()` tells what was paid.
        weather: What goes wrong; it can be changed from any thread.
    """

    url: str
    settings: SandboxSettings
    service: Service
    weather: ActiveFaults


def serve(
    settings: SandboxSettings,
    host: str,
    port: int,
    announce: Callable[[str], None] | None = None,
    plan: FaultPlan | None = None,
) -> None:
    """Serves until SIGINT or SIGTERM.

    Args:
        settings: How the sandbox behaves.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        announce: Called with the base URL as soon as it can be reached.
        plan: What goes wrong; without one, nothing.

    Raises:
        OSError: When the address cannot be listened on.
    """
    with _listen(host, port) as listener:
        if announce:
            announce(_url(listener))
        asyncio.run(_serve_until_signalled(_server(Sandbox(settings, plan).app), listener))


@contextmanager
def running_sandbox(
    settings: SandboxSettings | None = None, port: int = 0, plan: FaultPlan | None = None
) -> Iterator[RunningSandbox]:
    """Serves on loopback from a thread with its own event loop, and stops at the end.

    Args:
        settings: How the sandbox behaves; without them, as the real service does.
        port: Port to listen on; 0 takes a free one.
        plan: What goes wrong; without one, nothing.

    Raises:
        OSError: When the port is taken.
    """
    sandbox = Sandbox(settings or SandboxSettings(), plan)
    with _listen("127.0.0.1", port) as listener:
        server = _server(sandbox.app)
        thread = threading.Thread(
            target=lambda: asyncio.run(server.serve(sockets=[listener])), name="sandbox"
        )
        # Nobody has to wait for it to start: the socket listens, the kernel queues.
        thread.start()
        try:
            url = _url(listener)
            yield RunningSandbox(url, sandbox.settings, sandbox.service, sandbox.weather)
        finally:
            server.should_exit = True
            thread.join()


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        # Uvicorn's own raises the signal again after a clean stop: a traceback or a status.
        yield


class _Protocol(H11Protocol):
    """Lets the application end the connection that a request came on, as an ASGI extension."""

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
        return  # the client was faster
    # Closed without waiting, a socket that lingers for no time sends a reset.
    linger = struct.pack("ii", 1, 0)
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    transport.abort()


def _server(app: Starlette) -> _Server:
    config = uvicorn.Config(
        app,
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
        timeout_graceful_shutdown=_LAST_REQUESTS_SECONDS,
    )
    return _Server(config)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named as TCP, because asyncio switches Nagle's delay off only where it says so: without
    # it every reply takes 40 ms longer.
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
