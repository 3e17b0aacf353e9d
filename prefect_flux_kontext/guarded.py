"""A transport for URLs that others chose: it connects to public addresses alone.

A result's URL comes from the service, and a redirect from whoever serves it. Each is looked at
by its scheme and by every address of its host, and the connection goes to an address that was
looked at, so that a name which means another address a moment later leads nowhere else.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpcore
import httpx

from prefect_flux_kontext.addresses import METADATA, literal, not_public
from prefect_flux_kontext.api.connections import proxy_of
from prefect_flux_kontext.errors import RefusedUrlError

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Iterable, Iterator

    from prefect_flux_kontext.addresses import Address

Resolve = Callable[[str, int], Awaitable[list[str]]]
"""Gives the addresses of a name; raises OSError where there are none."""

_PORTS = {"http": 80, "https": 443}


async def resolve(host: str, port: int) -> list[str]:
    """Ask the system for the addresses of a name."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


class Guard:
    """Knows where connections may go.

    Args:
        base_url: The configured service, whose own host is always allowed. Where it is on a
            private network, such as a sandbox on loopback, so may its results be, on the same.
            One of https by name is taken for public and not resolved to find out.
        resolve: Gives the addresses of a name.
    """

    def __init__(self, base_url: str | None = None, resolve: Resolve = resolve) -> None:
        self._base = None if base_url is None else httpx.URL(base_url)
        self._resolve = resolve
        self._own: set[str] | None = None

    async def addresses(self, host: str, port: int) -> list[str]:
        """All addresses of a host, each of them allowed.

        Raises:
            RefusedUrlError: One of them is not.
            OSError: It has none.
        """
        found = await self._addresses(host, port)
        for address in found:
            kind = not_public(address)
            if kind == METADATA or not (kind is None or await self._is_own(host, kind)):
                raise RefusedUrlError(
                    f"The URL leads to {host[:100]}, and so to {address} ({kind}), which is no "
                    "address of the public internet; nothing was sent there."
                )
        return [str(address) for address in found]

    async def _addresses(self, host: str, port: int) -> list[Address]:
        address = literal(host)
        if address is not None:
            return [address]
        found = [literal(text) for text in await self._resolve(host, port)]
        if not found or None in found:
            raise OSError(f"{host[:100]} has no address")
        return [address for address in found if address is not None]

    async def _is_own(self, host: str, kind: str) -> bool:
        """Whether it is the service's host, or an address of a kind that the service has."""
        if self._base is None:
            return False
        if host == self._base.host:
            return True
        if literal(self._base.host) is None and self._base.scheme == "https":
            return False
        if self._own is None:
            try:
                found = await self._addresses(self._base.host, self._base.port or 80)
            except OSError:
                return False
            self._own = {kind for kind in map(not_public, found) if kind is not None}
        return kind in self._own


class GuardedTransport(httpx.AsyncBaseTransport):
    """Sends requests where the guard lets them go.

    Behind a proxy of the environment (HTTPS_PROXY …) the proxy resolves names and must guard
    them; what is a private address already is refused all the same.

    Args:
        guard: Knows where they may go.
        limits: Of the connections.
        tls: For https.
        network: Makes connections; tests give another.
    """

    def __init__(
        self,
        guard: Guard,
        *,
        limits: httpx.Limits,
        tls: ssl.SSLContext,
        network: httpcore.AsyncNetworkBackend | None = None,
    ) -> None:
        self._guard = guard
        self._limits = limits
        self._tls = tls
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=tls,
            max_connections=limits.max_connections,
            max_keepalive_connections=limits.max_keepalive_connections,
            keepalive_expiry=limits.keepalive_expiry,
            network_backend=_CheckedNetwork(guard, network or httpcore.AnyIOBackend()),
        )
        self._proxied: dict[str, httpx.AsyncHTTPTransport] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request, unless its URL is refused.

        Raises:
            RefusedUrlError: Its scheme, or an address of its host, is not allowed.
            httpx.TransportError: It went wrong.
        """
        url = request.url
        if url.scheme not in _PORTS or not url.host:
            raise RefusedUrlError(f"The URL is one of {url.scheme[:20]!r}, not of http or https.")
        if proxy := _proxy(url):
            return await self._through(proxy).handle_async_request(request)
        asked = httpcore.Request(
            method=request.method,
            url=httpcore.URL(
                scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
            ),
            headers=request.headers.raw,
            content=request.stream,
            extensions=request.extensions,
        )
        with _as_httpx(request):
            response = await self._pool.handle_async_request(asked)
        return httpx.Response(
            response.status,
            headers=response.headers,
            stream=_Body(response, request),
            extensions=response.extensions,
        )

    async def aclose(self) -> None:
        """Close all connections."""
        await self._pool.aclose()
        for transport in self._proxied.values():
            await transport.aclose()

    def _through(self, proxy: str) -> httpx.AsyncHTTPTransport:
        if proxy not in self._proxied:
            self._proxied[proxy] = httpx.AsyncHTTPTransport(
                proxy=proxy, verify=self._tls, limits=self._limits
            )
        return self._proxied[proxy]


def _proxy(url: httpx.URL) -> str | None:
    """The environment's proxy for a URL; none for a private address, which the guard judges."""
    address = literal(url.host)
    if address is not None and not_public(address):
        return None
    return proxy_of(url)


class _CheckedNetwork(httpcore.AsyncNetworkBackend):
    """Connects to an address that the guard has seen. TLS asks for the name's certificate."""

    def __init__(self, guard: Guard, network: httpcore.AsyncNetworkBackend) -> None:
        self._guard = guard
        self._network = network

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's signature
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        failure: Exception = httpcore.ConnectError(f"{host[:100]} has no address")
        try:
            async with asyncio.timeout(timeout):
                addresses = await self._guard.addresses(host, port)
        except TimeoutError:
            raise httpcore.ConnectTimeout(f"{host[:100]} could not be resolved") from None
        except OSError as error:
            raise httpcore.ConnectError(str(error)) from None
        for address in addresses:
            try:
                return await self._network.connect_tcp(
                    address, port, timeout, local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure

    async def sleep(self, seconds: float) -> None:
        await self._network.sleep(seconds)


class _Body(httpx.AsyncByteStream):
    """A response's body."""

    def __init__(self, response: httpcore.Response, request: httpx.Request) -> None:
        self._response = response
        self._request = request

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _as_httpx(self._request):
            async for piece in self._response.aiter_stream():
                yield piece

    async def aclose(self) -> None:
        with _as_httpx(self._request):
            await self._response.aclose()


@contextmanager
def _as_httpx(request: httpx.Request) -> Iterator[None]:
    """Raise httpcore's errors as httpx's, which have the same names."""
    try:
        yield
    except (
        httpcore.NetworkError,
        httpcore.TimeoutException,
        httpcore.ProtocolError,
        httpcore.UnsupportedProtocol,
        httpcore.ProxyError,
    ) as error:
        raise getattr(httpx, type(error).__name__)(str(error), request=request) from error
