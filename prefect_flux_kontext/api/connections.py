"""Connections to a server: many small pools, bounded replies, time limits set on purpose."""

from __future__ import annotations

import asyncio
import functools
import urllib.request
import zlib
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import httpx

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Callable, Mapping

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


def proxy_of(url: httpx.URL) -> str | None:
    """The environment's proxy for a URL (HTTPS_PROXY …), unless NO_PROXY names its host."""
    proxies = urllib.request.getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if not proxy or urllib.request.proxy_bypass(url.host):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


@dataclass
class _Pool:
    transport: httpx.AsyncBaseTransport
    busy: int = 0


class Connections:
    """Up to 128 connections, as pools that are opened when those before them are full.

    At full speed 33 submits and some 130 polls a second of 0.1 to 0.5 s each are under way.

    Requests go to httpx's transports: its client, with cookies, redirects and logins that are
    not needed here, takes two fifths of a request's time.

    Args:
        make: Makes the transport of one pool, with `POOL_LIMITS`.
        timeout: For each step of a request.
        headers: Sent with each request.
    """

    def __init__(
        self,
        make: Callable[[], httpx.AsyncBaseTransport],
        timeout: httpx.Timeout,
        headers: Mapping[str, str],
    ) -> None:
        self.timeout = timeout
        self._make = make
        self._pools: list[_Pool] = []
        self._closed = False
        self._headers = {"User-Agent": "prefect-flux-kontext", **headers}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections, for good."""
        self._closed = True
        for pool in self._pools:
            await pool.transport.aclose()

    @asynccontextmanager
    async def stream(
        self,
        method: str,
        url: str,
        *,
        json: object = None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[httpx.Response]:
        """Send a request and stream its response; a redirect is not followed."""
        request = httpx.Request(
            method,
            url,
            json=json,
            headers={**self._headers, **(headers or {})},
            extensions={"timeout": self.timeout.as_dict()},
        )
        pool = self._roomy()
        pool.busy += 1
        try:
            response = await pool.transport.handle_async_request(request)
            try:
                response.request = request
                yield response
            finally:
                await response.aclose()
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
    connections: Connections, method: str, url: str, *, json: object = None
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
        connections.stream(method, url, json=json) as response,
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


def _unpacked(body: bytes, headers: httpx.Headers) -> bytes:
    """The body itself, from proxies too that compress it although we ask them not to."""
    if headers.get("Content-Encoding", "").strip().lower() not in ("gzip", "x-gzip", "deflate"):
        return body
    try:
        return zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(body, _LARGEST_REPLY)
    except zlib.error:
        return body
