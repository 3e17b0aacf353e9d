"""Protect downloads against server-side request forgery (SSRF).

A result's URL comes from outside. `AddressGuard` checks every address that it leads to, and
`GuardedTransport` connects to checked addresses only.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import httpx
from aiohttp.abc import AbstractResolver, ResolveResult

from prefect_flux_kontext.client.addresses import (
    METADATA_SERVICE,
    Address,
    classify_non_public,
    parse_address,
)
from prefect_flux_kontext.client.transport import (
    AiohttpTransport,
    create_proxy_transport,
    create_tls_context,
    find_proxy,
)
from prefect_flux_kontext.errors import RefusedUrlError

if TYPE_CHECKING:
    import aiohttp

Resolve = Callable[[str, int], Awaitable[list[str]]]
"""Returns the addresses of a host name; raises OSError if there are none."""

# Anybody may have made the reply, and many are read at a time. The service's own replies may have
# larger headers, see `client.transport`.
_MAX_HEADER_BYTES = 16_384
_MAX_HEADERS = 100

_DEFAULT_PORTS = {"http": 80, "https": 443}


async def resolve(host: str, port: int) -> list[str]:
    """Resolve a host name with the system's resolver."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


class AddressGuard:
    """Decides which addresses downloads may connect to.

    The configured service's own host is always allowed. If it is on a private network, such as a
    sandbox on loopback, results may be on the same kind of network. A host name with https counts
    as public and is not resolved to find out.
    """

    def __init__(self, base_url: str | None = None, resolve: Resolve = resolve) -> None:
        self._base = None if base_url is None else httpx.URL(base_url)
        self._resolve = resolve
        self._service_kinds: set[str] | None = None

    async def resolve_allowed(self, host: str, port: int) -> list[str]:
        """Return all addresses of a host, or raise a RefusedUrlError if one is not allowed."""
        found = await self._find_addresses(host, port)
        for address in found:
            kind = classify_non_public(address)
            if kind == METADATA_SERVICE or not (
                kind is None or await self._belongs_to_service(host, kind)
            ):
                raise RefusedUrlError(
                    f"The URL's host {host[:100]} is at {address} ({kind}), which is not a public "
                    "address; nothing was sent."
                )
        return [str(address) for address in found]

    async def _find_addresses(self, host: str, port: int) -> list[Address]:
        address = parse_address(host)
        if address is not None:
            return [address]
        found = [parse_address(text) for text in await self._resolve(host, port)]
        if not found or None in found:
            raise OSError(f"{host[:100]} has no address")
        return [address for address in found if address is not None]

    async def _belongs_to_service(self, host: str, kind: str) -> bool:
        """Whether a host is the service's, or its address is of a kind that the service has."""
        if self._base is None:
            return False
        if host == self._base.host:
            return True
        if parse_address(self._base.host) is None and self._base.scheme == "https":
            return False
        if self._service_kinds is None:
            try:
                found = await self._find_addresses(self._base.host, self._base.port or 80)
            except OSError:
                return False
            self._service_kinds = {
                kind for kind in map(classify_non_public, found) if kind is not None
            }
        return kind in self._service_kinds


class GuardedTransport(AiohttpTransport):
    """Sends requests to allowed addresses only. TLS verifies the certificate of the host name.

    Behind a proxy of the environment (HTTPS_PROXY …) the proxy resolves host names and has to
    guard them. URLs with a private IP address are refused there too.
    """

    def __init__(
        self, guard: AddressGuard, *, socket_factory: aiohttp.SocketFactoryType | None = None
    ) -> None:
        super().__init__(
            create_tls_context(),
            resolver=_GuardedResolver(guard),
            socket_factory=socket_factory,
            max_header_bytes=_MAX_HEADER_BYTES,
            max_headers=_MAX_HEADERS,
        )
        self._guard = guard
        self._proxy_transports: dict[str, httpx.AsyncHTTPTransport] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request if its URL is allowed, or raise a RefusedUrlError."""
        url = request.url
        if url.scheme not in _DEFAULT_PORTS or not url.host:
            raise RefusedUrlError(
                f"The URL has the scheme {url.scheme[:20]!r}; only http and https are allowed."
            )
        address = parse_address(url.host)
        is_private = address is not None and classify_non_public(address)
        proxy = None if is_private else find_proxy(url)
        if proxy is not None:
            if proxy not in self._proxy_transports:
                self._proxy_transports[proxy] = create_proxy_transport(proxy)
            return await self._proxy_transports[proxy].handle_async_request(request)
        host = url.raw_host.decode()
        # aiohttp passes only names to the resolver.
        if ":" in host or not any(map(str.isalpha, host)):
            try:
                await self._guard.resolve_allowed(host, url.port or _DEFAULT_PORTS[url.scheme])
            except OSError as error:
                raise httpx.ConnectError(str(error), request=request) from None
        return await super().handle_async_request(request)

    async def aclose(self) -> None:
        """Close all connections."""
        await super().aclose()
        for transport in self._proxy_transports.values():
            await transport.aclose()


class _GuardedResolver(AbstractResolver):
    """Resolves host names for aiohttp through the guard."""

    def __init__(self, guard: AddressGuard) -> None:
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
            for address in await self._guard.resolve_allowed(host, port)
        ]

    async def close(self) -> None:
        """Do nothing: there is nothing to close."""
