"""A transport for URLs that others chose: it connects to public addresses alone.

A result's URL comes from the service, and a redirect from whoever serves it. Each is looked at
by its scheme and by every address of its host, and the connection goes to an address that was
looked at, so that a name which means another address a moment later leads nowhere else.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import httpx
from aiohttp.abc import AbstractResolver, ResolveResult

from prefect_flux_kontext.addresses import METADATA, literal, not_public
from prefect_flux_kontext.api.connections import proxied, proxy_of, tls_context
from prefect_flux_kontext.api.wire import WireTransport
from prefect_flux_kontext.errors import RefusedUrlError

if TYPE_CHECKING:
    import aiohttp

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


class GuardedTransport(WireTransport):
    """Sends requests where the guard lets them go. TLS asks for the name's certificate.

    Behind a proxy of the environment (HTTPS_PROXY …) the proxy resolves names and must guard
    them; what is a private address already is refused all the same.

    Args:
        guard: Knows where they may go.
        socket_factory: Makes the socket for an address; tests give another.
    """

    def __init__(
        self, guard: Guard, *, socket_factory: aiohttp.SocketFactoryType | None = None
    ) -> None:
        super().__init__(
            tls_context(), resolver=_CheckedNames(guard), socket_factory=socket_factory
        )
        self._guard = guard
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
        host = url.raw_host.decode()
        if ":" in host or not any(map(str.isalpha, host)):  # aiohttp resolves names alone
            try:
                await self._guard.addresses(host, url.port or _PORTS[url.scheme])
            except OSError as error:
                raise httpx.ConnectError(str(error), request=request) from None
        return await super().handle_async_request(request)

    async def aclose(self) -> None:
        """Close all connections."""
        await super().aclose()
        for transport in self._proxied.values():
            await transport.aclose()

    def _through(self, proxy: str) -> httpx.AsyncHTTPTransport:
        if proxy not in self._proxied:
            self._proxied[proxy] = proxied(proxy)
        return self._proxied[proxy]


def _proxy(url: httpx.URL) -> str | None:
    """The environment's proxy for a URL; none for a private address, which the guard judges."""
    address = literal(url.host)
    if address is not None and not_public(address):
        return None
    return proxy_of(url)


class _CheckedNames(AbstractResolver):
    """Gives aiohttp the addresses of names that the guard has seen."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    async def resolve(
        self,
        host: str,
        port: int = 0,
        family: socket.AddressFamily = socket.AF_UNSPEC,  # noqa: ARG002 - aiohttp's signature
    ) -> list[ResolveResult]:
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in await self._guard.addresses(host, port)
        ]

    async def close(self) -> None:
        """Nothing to close."""
