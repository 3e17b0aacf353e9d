"""Protect downloads against server-side request forgery (SSRF).

A result's URL comes from outside. `AddressGuard` checks every address that it leads to, and
`GuardedTransport` connects to checked addresses only.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import httpx
from aiohttp.abc import AbstractResolver, ResolveResult

from prefect_flux_kontext.client.transport import (
    AiohttpTransport,
    create_proxy_transport,
    create_tls_context,
    find_proxy,
)
from prefect_flux_kontext.errors import RefusedUrlError

if TYPE_CHECKING:
    import aiohttp

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

Resolve = Callable[[str, int], Awaitable[list[str]]]
"""Returns the addresses of a host name; raises OSError if there are none."""

# Anybody may have made the reply, and many are read at a time. The service's own replies may have
# larger headers, see `client.transport`.
_MAX_HEADER_BYTES = 16_384
_MAX_HEADERS = 100

_DEFAULT_PORTS = {"http": 80, "https": 443}

_RANGES = {
    name: [ipaddress.ip_network(text) for text in networks]
    for name, *networks in (
        ("unspecified", "0.0.0.0/8", "::/128"),
        ("loopback", "127.0.0.0/8", "::1/128"),
        ("private 10.0.0.0/8", "10.0.0.0/8"),
        ("private 172.16.0.0/12", "172.16.0.0/12"),
        ("private 192.168.0.0/16", "192.168.0.0/16"),
        ("private fc00::/7", "fc00::/7"),
        ("carrier-grade NAT", "100.64.0.0/10"),
        ("link-local", "169.254.0.0/16", "fe80::/10"),
        ("site-local", "fec0::/10"),
        ("multicast", "224.0.0.0/4", "ff00::/8"),
        # NAT64 inside of a network, Teredo: the final address is unknown.
        ("translated", "64:ff9b:1::/48", "2001::/32"),
    )
}

METADATA_SERVICE = "cloud metadata service"

_METADATA_ADDRESSES = {
    ipaddress.ip_address(text)
    for text in (
        "169.254.169.254",  # AWS, Google, Azure and others
        "169.254.170.2",  # AWS, containers
        "169.254.170.23",  # AWS, Kubernetes
        "fd00:ec2::254",  # AWS
        "fd20:ce::254",  # Google
        "100.100.100.200",  # Alibaba
        "168.63.129.16",  # Azure, a public address
        "192.0.0.192",  # Oracle
    )
}

_IPV4_IN_IPV6 = [
    # (network, number of bits to the right of the IPv4 address)
    (ipaddress.IPv6Network("::ffff:0:0/96"), 0),  # mapped
    (ipaddress.IPv6Network("::ffff:0:0:0/96"), 0),  # translated
    (ipaddress.IPv6Network("::/96"), 0),  # compatible
    (ipaddress.IPv6Network("64:ff9b::/96"), 0),  # NAT64
    (ipaddress.IPv6Network("2002::/16"), 80),  # 6to4
]


def parse_address(host: str) -> Address | None:
    """Parse a host that is an IP address, in any notation that resolvers accept; None for a name.

    Decimal, octal and hexadecimal numbers are IPv4 addresses: `2130706433` and `0x7f.1` are
    127.0.0.1.
    """
    host = host.strip("[]")
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        pass
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host))
    except (OSError, ValueError):
        return None


def classify_non_public(address: Address) -> str | None:
    """Return the kind of a non-public address, or None for a public one.

    An IPv4 address inside an IPv6 address counts as itself.
    """
    if isinstance(address, ipaddress.IPv6Address):
        address = ipaddress.IPv6Address(int(address))  # drops the scope
    if address in _METADATA_ADDRESSES:
        return METADATA_SERVICE
    for name, networks in _RANGES.items():
        if any(address in network for network in networks):
            return name
    if isinstance(address, ipaddress.IPv6Address):
        for network, shift in _IPV4_IN_IPV6:
            if address in network:
                return classify_non_public(
                    ipaddress.IPv4Address(int(address) >> shift & 0xFFFFFFFF)
                )
    return None if address.is_global else "reserved"


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
        if proxy := _find_proxy(url):
            return await self._get_proxy_transport(proxy).handle_async_request(request)
        host = url.raw_host.decode()
        if ":" in host or not any(
            map(str.isalpha, host)
        ):  # aiohttp passes only names to the resolver
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

    def _get_proxy_transport(self, proxy: str) -> httpx.AsyncHTTPTransport:
        if proxy not in self._proxy_transports:
            self._proxy_transports[proxy] = create_proxy_transport(proxy)
        return self._proxy_transports[proxy]


def _find_proxy(url: httpx.URL) -> str | None:
    """Return the environment's proxy for a URL; None for a private address, which is guarded."""
    address = parse_address(url.host)
    if address is not None and classify_non_public(address):
        return None
    return find_proxy(url)


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
