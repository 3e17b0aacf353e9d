"""A loopback HTTP proxy in front of the sandbox that loses, delays and spoils what passes.

What befalls a request follows from the seed, its kind and its number among its kind alone, so
a run can be repeated. Vocabulary: a fault `after` the service has seen the request leaves a
submit paid for, one `before` does not.
"""

import asyncio
import contextlib
import random
import re
import socket
import struct
import threading
from collections import Counter
from dataclasses import dataclass, field
from urllib.parse import urlsplit

AFTER = ("reset_after", "closed_after", "hang_after", "trouble_after")
BEFORE = ("trouble_before", "reset_before", "limited", "limited_in_200", "refused")
_BODIES = {
    "trouble_after": (502, b"<html>bad gateway</html>"),
    "trouble_before": (503, b"<html>unavailable</html>"),
    "limited": (429, b'{"code": 429, "message": "too many requests", "data": null}'),
    "limited_in_200": (200, b'{"code": 429, "message": "too many requests", "data": null}'),
    "unauthorized": (401, b'{"code": 401, "message": "unauthorized", "data": null}'),
    "no_balance": (402, b'{"code": 402, "message": "balance too low", "data": null}'),
    "slow_down": (503, b"<Error><Code>SlowDown</Code><Message>later</Message></Error>"),
    "too_many": (429, b"<Error><Code>TooManyRequests</Code><Message>later</Message></Error>"),
    "denied": (403, b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>"),
    "refused": (400, b'{"code": 400, "message": "invalid parameters", "data": null}'),
}


@dataclass
class FaultProxy:
    """What it does and what it has done.

    Attributes:
        url: Where it listens.
        rates: Share of requests of each kind (`submit`, `status`, `download`; of others, such as
            those to an S3 server, the method in small letters) for each fault.
        script: The fault of the n-th request of a kind, from 1; it wins over the rates.
        slow: Seconds by which every submit's reply is held back.
        log: (kind, number, fault or None) of each request, as they came.
        connections: Clients' connections that are open.
        most_connections: How many were open at once, at most.
    """

    upstream: str
    seed: int = 0
    rates: dict[str, dict[str, float]] = field(default_factory=dict)
    script: dict[tuple[str, int], str] = field(default_factory=dict)
    slow: float = 0.0
    hang: float = 0.5
    url: str = ""
    log: list[tuple[str, int, str | None]] = field(default_factory=list)
    numbers: Counter = field(default_factory=Counter)
    posts_under_way: int = 0
    connections: int = 0
    most_connections: int = 0

    def count(self, fault):
        """How often a fault has befallen a request."""
        return sum(seen == fault for _, _, seen in self.log)

    def _fault(self, kind, number):
        if fault := self.script.get((kind, number)):
            return fault
        dice = random.Random(f"{self.seed}/{kind}/{number}").random()
        for fault, rate in self.rates.get(kind, {}).items():
            dice -= rate
            if dice < 0:
                return fault
        return None

    async def _serve(self, reader, writer):
        self.connections += 1
        self.most_connections = max(self.most_connections, self.connections)
        try:
            while await self._one(reader, writer):
                pass
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
        kind = _kind(head.split(b"\r\n")[0])
        self.numbers[kind] += 1
        fault = self._fault(kind, self.numbers[kind])
        self.log.append((kind, self.numbers[kind], fault))
        if fault == "reset_before":
            return _reset(writer)
        if fault in _BODIES and fault not in AFTER:
            return await _answer(writer, fault, body=kind != "head")
        self.posts_under_way += kind == "submit"
        try:
            reply = await self._forward(head, body)
            if kind == "submit" and self.slow:
                await asyncio.sleep(self.slow)
            return await self._spoil(fault, reply, writer)
        finally:
            self.posts_under_way -= kind == "submit"

    async def _spoil(self, fault, reply, writer):
        """Pass the service's reply on, or what is left of it; whether the connection stays."""
        if fault == "trouble_after":
            return await _answer(writer, fault)
        if fault == "reset_after":
            return _reset(writer)
        if fault == "hang_after":
            await asyncio.sleep(self.hang)
        if fault in ("hang_after", "closed_after"):
            return False
        writer.write(reply[: len(reply) // 2] if fault == "half" else reply)
        await writer.drain()
        return fault != "half"

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


def _kind(first_line):
    if first_line.startswith(b"POST"):
        return "submit"
    if b" /results/" in first_line:
        return "download"
    if b"/statusTask/" in first_line:
        return "status"
    return first_line.split(b" ")[0].decode().lower()


async def _closed(writer):
    try:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    finally:
        writer.transport.abort()


async def _answer(writer, fault, *, body=True):
    status, told = _BODIES[fault]
    head = f"HTTP/1.1 {status} Fault\r\nContent-Length: {len(told)}\r\n\r\n"
    writer.write(head.encode() + told * body)
    await writer.drain()
    return True


def _reset(writer):
    linger = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()
    return False


@contextlib.contextmanager
def fault_proxy(upstream, **how):
    """Serve from a thread with its own event loop while the block runs."""
    proxy = FaultProxy(upstream, **how)
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
