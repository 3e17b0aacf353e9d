"""A loopback HTTP proxy in front of an S3 server that refuses a share of what passes.

What befalls a request follows from its method and its number among its kind alone.
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
    "denied": (403, b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>"),
}


@dataclass
class FaultProxy:
    """What it does and what it has done.

    Attributes:
        url: Where it listens.
        rates: Share of requests of each method, in small letters, for each fault.
        numbers: How many requests of each method have come.
        befallen: How often each fault has befallen one.
        connections: Clients' connections that are open.
        most_connections: How many were open at once, at most.
    """

    upstream: str
    rates: dict[str, dict[str, float]] = field(default_factory=dict)
    url: str = ""
    numbers: Counter = field(default_factory=Counter)
    befallen: Counter = field(default_factory=Counter)
    connections: int = 0
    most_connections: int = 0

    def _fault(self, method):
        dice = random.Random(f"{method}/{self.numbers[method]}").random()
        for fault, rate in self.rates.get(method, {}).items():
            dice -= rate
            if dice < 0:
                return fault
        return None

    async def _serve(self, reader, writer):
        self.connections += 1
        self.most_connections = max(self.most_connections, self.connections)
        try:
            while True:
                await self._one(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self.connections -= 1
            await _closed(writer)

    async def _one(self, reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        if re.search(rb"\r\nexpect: *100-continue", head, re.IGNORECASE):
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
        body = await reader.readexactly(int(length[1]) if length else 0)
        method = head.split(b" ")[0].decode().lower()
        self.numbers[method] += 1
        if fault := self._fault(method):
            self.befallen[fault] += 1
            status, told = REPLIES[fault]
            answer = f"HTTP/1.1 {status} Fault\r\nContent-Length: {len(told)}\r\n\r\n".encode()
            writer.write(answer + told * (method != "head"))
        else:
            writer.write(await self._forward(head, body))
        await writer.drain()

    async def _forward(self, head, body):
        where = urlsplit(self.upstream)
        reader, writer = await asyncio.open_connection(where.hostname, where.port)
        lines = [
            line
            for line in head.rstrip(b"\r\n").split(b"\r\n")
            if not line.lower().startswith((b"connection:", b"expect:"))
        ]
        try:
            writer.write(b"\r\n".join([*lines, b"Connection: close", b"", b""]) + body)
            reply = await reader.read(-1)
        finally:
            await _closed(writer)
        return reply.replace(b"connection: close\r\n", b"", 1)


async def _closed(writer):
    try:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    finally:
        writer.transport.abort()


@contextlib.contextmanager
def fault_proxy(upstream):
    """Serve from a thread with its own event loop while the block runs."""
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
        await asyncio.sleep(0)  # for the transports to let go of their sockets

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
