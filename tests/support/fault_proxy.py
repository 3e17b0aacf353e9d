"""A loopback HTTP proxy in front of an S3 server that fails a share of the requests.

Which fault applies to a request depends only on its method and its number among the requests of
that method, so runs are repeatable.
"""

import asyncio
import contextlib
import random
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from urllib.parse import urlsplit

REPLIES = {
    "slow_down": (503, b"<Error><Code>SlowDown</Code><Message>later</Message></Error>"),
    "too_many": (429, b"<Error><Code>TooManyRequests</Code><Message>later</Message></Error>"),
    "conflict": (
        409,
        b"<Error><Code>ConditionalRequestConflict</Code><Message>retry</Message></Error>",
    ),
    "not_implemented": (
        501,
        b"<Error><Code>NotImplemented</Code><Message>If-None-Match</Message></Error>",
    ),
    "denied": (403, b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>"),
}


@dataclass
class FaultProxy:
    """The configuration and the counters of a proxy.

    Attributes:
        upstream: URL of the S3 server.
        rates: Share of the requests of a method (in lower case) that each fault applies to.
        url: URL of the proxy.
        numbers: Number of requests of each method.
        applied: Number of requests that each fault applied to.
        drops: Names of headers that are not forwarded, in lower case.
        hides_missing: Whether to answer 403 for what does not exist, as S3 does without the
            permission to list.
        connections: Open client connections.
        most_connections: Largest number of open client connections.
    """

    upstream: str
    rates: dict[str, dict[str, float]] = field(default_factory=dict)
    url: str = ""
    drops: tuple[bytes, ...] = ()
    hides_missing: bool = False
    numbers: Counter = field(default_factory=Counter)
    applied: Counter = field(default_factory=Counter)
    connections: int = 0
    most_connections: int = 0

    def _choose_fault(self, method):
        chance = random.Random(f"{method}/{self.numbers[method]}").random()
        for fault, rate in self.rates.get(method, {}).items():
            chance -= rate
            if chance < 0:
                return fault
        return None

    async def _serve(self, reader, writer):
        self.connections += 1
        self.most_connections = max(self.most_connections, self.connections)
        try:
            while True:
                await self._serve_request(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self.connections -= 1
            await _close(writer)

    async def _serve_request(self, reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        if re.search(rb"\r\nexpect: *100-continue", head, re.IGNORECASE):
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
        body = await reader.readexactly(int(length[1]) if length else 0)
        method = head.split(b" ")[0].decode().lower()
        self.numbers[method] += 1
        if fault := self._choose_fault(method):
            self.applied[fault] += 1
            reply = _make_reply(fault, method)
        else:
            reply = await self._forward(head, body)
            if self.hides_missing and reply.startswith(b"HTTP/1.1 404"):
                reply = _make_reply("denied", method)
        writer.write(reply)
        await writer.drain()

    async def _forward(self, head, body):
        where = urlsplit(self.upstream)
        reader, writer = await asyncio.open_connection(where.hostname, where.port)
        lines = [
            line
            for line in head.rstrip(b"\r\n").split(b"\r\n")
            if not line.lower().startswith((b"connection:", b"expect:", *self.drops))
        ]
        try:
            writer.write(b"\r\n".join([*lines, b"Connection: close", b"", b""]) + body)
            reply = await reader.read(-1)
        finally:
            await _close(writer)
        return reply.replace(b"connection: close\r\n", b"", 1)


def _make_reply(fault, method):
    status, body = REPLIES[fault]
    head = f"HTTP/1.1 {status} Fault\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    return head + body * (method != "head")


async def _close(writer):
    try:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    finally:
        writer.transport.abort()


@contextlib.contextmanager
def fault_proxy(upstream):
    """Serve from a thread with its own event loop while the context is open."""
    proxy = FaultProxy(upstream)
    ready, loop = threading.Event(), asyncio.new_event_loop()

    async def start():
        server = await asyncio.start_server(proxy._serve, "127.0.0.1", 0, backlog=1024)
        proxy.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        ready.set()
        return server

    async def end_all():
        serving = asyncio.all_tasks() - {asyncio.current_task()}
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
        await asyncio.sleep(0)  # lets the transports close their sockets

    def serve():
        asyncio.set_event_loop(loop)
        server = loop.run_until_complete(start())
        loop.run_forever()
        server.close()
        loop.run_until_complete(end_all())
        loop.close()

    thread = threading.Thread(target=serve, name="fault-proxy")
    thread.start()
    ready.wait()
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
