"""A service on loopback that gives the same answer to everything."""

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass


@dataclass
class OneAnswer:
    url: str
    posts: int = 0
    gets: int = 0
    heard: bytes = b""


@asynccontextmanager
async def server_that_answers(status, body=b""):
    async def answer(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        told.heard += head
        if head.startswith(b"POST"):
            told.posts += 1
        else:
            told.gets += 1
        writer.write(
            b"HTTP/1.1 %d Said\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b"
            % (status, len(body), body)
        )
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        told = OneAnswer(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        yield told
