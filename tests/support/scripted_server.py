"""A loopback HTTP server that plays a script byte by byte and records the requests.

Each request is answered by the next play of the script; the last play is repeated. So a script
of a fault and then a success shows whether a client sent its request twice.
"""

import asyncio
import contextlib
import json
import socket
import struct
from dataclasses import dataclass

REASON = "Scripted"


@dataclass
class ReceivedRequest:
    """One request as it was received."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    connection: int

    def json(self):
        return json.loads(self.body)


class ScriptedServer:
    """Async context manager that serves the script. `url` is valid inside it.

    Each play writes a reply and returns whether the connection stays open.
    """

    def __init__(self, *script):
        self.script = list(script)
        self.seen = []
        self.url = ""
        self._connections = 0
        self._handlers = set()

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        return self

    async def __aexit__(self, *exc_info):
        self._server.close()
        for handler in self._handlers:
            handler.cancel()
        await asyncio.gather(*self._handlers, return_exceptions=True)

    @property
    def connections(self):
        return self._connections

    async def _serve(self, reader, writer):
        handler = asyncio.current_task()
        self._handlers.add(handler)
        handler.add_done_callback(self._handlers.discard)
        self._connections += 1
        number = self._connections
        try:
            while (request := await _read_request(reader, number)) is not None:
                self.seen.append(request)
                play = self.script[min(len(self.seen), len(self.script)) - 1]
                if not await play(writer):
                    break
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await writer.wait_closed()


async def _read_request(reader, connection):
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, OSError):
        return None
    first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    method, target, _version = first.split(" ")
    headers = {
        name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
    }
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return ReceivedRequest(method, target, headers, body, connection)


def _head(status, headers):
    lines = [f"HTTP/1.1 {status} {REASON}", *(f"{name}: {headers[name]}" for name in headers)]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def reply(status=200, body=b"", *, close=False, **headers):
    """Return a play of a complete reply.

    A body that is not bytes is sent as JSON. Keywords are headers: `retry_after=` is Retry-After.
    """
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-").title(): value for name, value in headers.items()}
    named = {"Content-Type": "application/json", "Content-Length": len(content), **named}

    async def play(writer):
        writer.write(_head(status, named) + content)
        await writer.drain()
        return not close

    return play


def envelope(code=200, data=None, message="success", *, status=200, **headers):
    """Return a play of a reply in the contract's envelope."""
    return reply(status, {"code": code, "message": message, "data": data}, **headers)


def accepted(task_id="task_1"):
    """Return a play of the reply to an accepted submit."""
    return envelope(data={"taskId": task_id})


def html(status, text="<html><body><h1>Bad gateway</h1></body></html>"):
    """Return a play of a proxy's error page."""
    return reply(status, text.encode(), content_type="text/html")


def redirect(target, status=307):
    """Return a play of a redirect."""
    return reply(status, b"", location=target)


def half_a_reply(status=200, body=b'{"code": 200, "data": {"taskId": "task_1"}}', **headers):
    """Return a play that closes the connection after half of the announced body."""

    async def play(writer):
        named = {"Content-Length": len(body), **headers}
        writer.write(_head(status, named) + body[: len(body) // 2])
        await writer.drain()
        return False

    return play


async def reset(writer):
    """Reset the connection after the request was read."""
    linger = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()
    return False


async def hang_up(_writer):
    """Close the connection without a reply."""
    return False


async def silence(_writer):
    """Never reply."""
    await asyncio.Event().wait()


async def endless(writer):
    """Send a body that never ends."""
    writer.write(_head(200, {"Content-Type": "application/json"}) + b'{"code": 200, "x": "')
    while True:
        writer.write(b"x" * 65_536)
        await writer.drain()
