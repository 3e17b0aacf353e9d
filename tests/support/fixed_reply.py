"""A loopback service that gives the same reply to every request."""

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass


@dataclass
class FixedReplyService:
    """The URL of the service and the requests that it received."""

    url: str
    posts: int = 0
    gets: int = 0
    received: bytes = b""


@asynccontextmanager
async def fixed_reply_server(status, body=b""):
    """Serve the reply on a free port while the context is open."""

    async def answer(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        service.received += head
        if head.startswith(b"POST"):
            service.posts += 1
        else:
            service.gets += 1
        writer.write(
            b"HTTP/1.1 %d Scripted\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b"
            % (status, len(body), body)
        )
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        service = FixedReplyService(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        yield service
