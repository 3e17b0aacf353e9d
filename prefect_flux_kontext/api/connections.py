"""Requests to a server: bounded replies, time limits set on purpose, the environment's proxies."""

from __future__ import annotations

import asyncio
import functools
import urllib.request
import zlib
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Self, cast

import httpx

from prefect_flux_kontext.api.wire import KEPT_IDLE, MOST_CONNECTIONS

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Mapping

_LARGEST_REPLY = 4 * 2**20
_REFUSALS = range(400, 500)

# A submit whose reply does not come may be billed without our knowing, so patience is cheap.
API_TIMEOUT = httpx.Timeout(connect=10, read=60, write=60, pool=60)
_LONGEST_REQUEST = 120.0


@functools.cache
def tls_context() -> ssl.SSLContext:
    """The process's one TLS context: making one reads all certificates, some 20 ms."""
    context = httpx.create_ssl_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


def proxy_of(url: httpx.URL) -> str | None:
    """The environment's proxy for a URL (HTTPS_PROXY …), unless NO_PROXY names its host."""
    proxies = urllib.request.getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if not proxy or urllib.request.proxy_bypass(url.host):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def proxied(proxy: str) -> httpx.AsyncHTTPTransport:
    """A transport that sends all requests through a proxy; httpx's, which knows every kind."""
    limits = httpx.Limits(max_connections=MOST_CONNECTIONS, keepalive_expiry=KEPT_IDLE)
    return httpx.AsyncHTTPTransport(proxy=proxy, verify=tls_context(), limits=limits)


class Connections:
    """A transport with the headers and time limits that all requests to a server share.

    There is no `httpx.AsyncClient` above it: its cookies, redirects and logins are not needed
    here, and take two fifths of a request's time.

    Args:
        transport: Sends requests.
        timeout: For each step of a request.
        headers: Sent with each request.
    """

    def __init__(
        self,
        transport: httpx.AsyncBaseTransport,
        timeout: httpx.Timeout,
        headers: Mapping[str, str],
    ) -> None:
        self.timeout = timeout
        self._transport = transport
        self._closed = False
        self._headers = {"User-Agent": "prefect-flux-kontext", **headers}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections, for good."""
        self._closed = True
        await self._transport.aclose()

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
        if self._closed:  # a new connection would never be closed
            raise RuntimeError("The client has been closed.")
        response = await self._transport.handle_async_request(request)
        try:
            response.request = request
            yield response
        finally:
            await response.aclose()


def streamed(response: httpx.Response) -> httpx.AsyncByteStream:
    """The body in the pieces in which it comes, packed as it is sent."""
    return cast("httpx.AsyncByteStream", response.stream)


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
            async for chunk in streamed(response):
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
