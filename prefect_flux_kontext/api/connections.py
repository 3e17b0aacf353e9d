"""Connections to a server: many small pools, bounded replies, time limits set on purpose."""

from __future__ import annotations

import asyncio
import functools
import logging
import zlib
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import httpx

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Callable

_LARGEST_REPLY = 4 * 2**20
_REFUSALS = range(400, 500)

# httpcore looks at each connection of a pool several times for each request: one pool of 128
# took half of the CPU time of a batch, pools of 4 hardly any.
_POOL_SIZE = 4
_POOLS = 32

# An idle connection is dropped after 2 s, before servers do (5 s and up): a request sent into a
# connection that is just being closed has an unknown fate.
POOL_LIMITS = httpx.Limits(
    max_connections=_POOL_SIZE, max_keepalive_connections=_POOL_SIZE, keepalive_expiry=2
)

# A submit whose reply does not come may be billed without our knowing, so patience is cheap.
API_TIMEOUT = httpx.Timeout(connect=10, read=60, write=60, pool=60)
_LONGEST_REQUEST = 120.0


@functools.cache
def tls_context() -> ssl.SSLContext:
    """The process's one TLS context: making one reads all certificates, some 20 ms."""
    return httpx.create_ssl_context()


@dataclass
class _Pool:
    client: httpx.AsyncClient
    busy: int = 0


class Connections:
    """Up to 128 connections, as pools that are opened when those before them are full.

    At full speed 33 submits and some 130 polls a second of 0.1 to 0.5 s each are under way.

    Args:
        make: Makes the client of one pool, with `POOL_LIMITS`.
        timeout: For each step of a request.
    """

    def __init__(self, make: Callable[[], httpx.AsyncClient], timeout: httpx.Timeout) -> None:
        self.timeout = timeout
        self._make = make
        self._pools: list[_Pool] = []
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections, for good."""
        self._closed = True
        for pool in self._pools:
            await pool.client.aclose()

    @asynccontextmanager
    async def stream(self, method: str, url: str, **how: Any) -> AsyncIterator[httpx.Response]:
        """Send a request and stream its response, as httpx does."""
        pool = self._roomy()
        pool.busy += 1
        try:
            async with pool.client.stream(method, url, timeout=self.timeout, **how) as response:
                yield response
        finally:
            pool.busy -= 1

    def _roomy(self) -> _Pool:
        if self._closed:  # a new pool would never be closed
            raise RuntimeError("The client has been closed.")
        for pool in self._pools:
            if not pool.busy:
                return pool
        if len(self._pools) < _POOLS:
            self._pools.append(_Pool(self._make()))
            return self._pools[-1]
        return min(self._pools, key=lambda pool: pool.busy)


async def exchange(
    connections: Connections, method: str, url: str, **how: Any
) -> tuple[int, httpx.Headers, bytes]:
    """Send a request and read its whole reply, but no more than 4 MB and for no more than 120 s.

    Returns:
        Status, headers and body.

    Raises:
        httpx.HTTPError: The request failed.
        TimeoutError: It took too long in all.
    """
    body = bytearray()
    async with (
        asyncio.timeout(_LONGEST_REQUEST),
        connections.stream(method, url, **how) as response,
    ):
        try:
            # What a MockTransport answers has been read already.
            read = response.is_stream_consumed
            async for chunk in response.aiter_bytes() if read else response.aiter_raw():
                body += chunk
                if len(body) > _LARGEST_REPLY:
                    break
        except httpx.TransportError:
            if response.status_code not in _REFUSALS:
                raise  # a refusal is one without its body too
    return response.status_code, response.headers, _unpacked(bytes(body), response.headers)


def _without_queries(record: logging.LogRecord) -> bool:
    """Leave out of httpx's line for each request what may sign its URL."""
    if isinstance(record.args, tuple):
        record.args = tuple(
            argument.copy_with(query=None, fragment=None, username=None, password=None)
            if isinstance(argument, httpx.URL)
            else argument
            for argument in record.args
        )
    return True


logging.getLogger("httpx").addFilter(_without_queries)


def _unpacked(body: bytes, headers: httpx.Headers) -> bytes:
    """The body itself, from proxies too that compress it although we ask them not to."""
    if headers.get("Content-Encoding", "").strip().lower() not in ("gzip", "x-gzip", "deflate"):
        return body
    try:
        return zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(body, _LARGEST_REPLY)
    except zlib.error:
        return body
