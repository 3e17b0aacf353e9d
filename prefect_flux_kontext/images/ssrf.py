"""Protection against server-side request forgery: downloads reach public addresses only."""

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
AddressLookup = Callable[[str, int], Awaitable[list[str]]]
"""Returns the addresses of a host and port; raises OSError if there are none."""

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
        # Network-local NAT64 and Teredo: the target address is not known.
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
    # (network, bits to the right of the IPv4 address)
    (ipaddress.IPv6Network("::ffff:0:0/96"), 0),  # mapped
    (ipaddress.IPv6Network("::ffff:0:0:0/96"), 0),  # translated
    (ipaddress.IPv6Network("::/96"), 0),  # compatible
    (ipaddress.IPv6Network("64:ff9b::/96"), 0),  # NAT64
    (ipaddress.IPv6Network("2002::/16"), 80),  # 6to4
]


def parse_address(host: str) -> Address | None:
    """Parse a host as an address, in any notation that resolvers accept; None for a name.

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


def classify_address(address: Address) -> str | None:
    """Return the kind of a non-public address, or None for a public one.

    An IPv4 address embedded in an IPv6 address is classified as the IPv4 address.
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
                return classify_address(ipaddress.IPv4Address(int(address) >> shift & 0xFFFFFFFF))
    return None if address.is_global else "reserved"


async def resolve_host(host: str, port: int) -> list[str]:
    """Resolve a name with the resolver of the system."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


class Guard:
    """Decides which addresses downloads may connect to.

    Args:
        base_url: The configured service. Its host is always allowed, except at a metadata
            address. If the service is on a private network, such as a sandbox on loopback, its
            results may be on a network of the same kind. A service with https and a host name
            counts as public and is not resolved.
        resolve: Resolves host names.
    """

    def __init__(self, base_url: str | None = None, resolve: AddressLookup = resolve_host) -> None:
        self._base = None if base_url is None else httpx.URL(base_url)
        self._resolve = resolve
        self._service_kinds: set[str] | None = None

    async def resolve_allowed(self, host: str, port: int) -> list[str]:
        """Resolve a host to addresses that are all allowed.

        Raises:
            RefusedUrlError: An address is not allowed.
            OSError: The host has no address.
        """
        found = await self._resolve_addresses(host, port)
        for address in found:
            kind = classify_address(address)
            if kind == METADATA_SERVICE or not (
                kind is None or await self._is_service_network(host, kind)
            ):
                raise RefusedUrlError(
                    f"The host {host[:100]} resolves to {address} ({kind}), which is not a public "
                    "address; no request was sent."
                )
        return [str(address) for address in found]

    async def _resolve_addresses(self, host: str, port: int) -> list[Address]:
        address = parse_address(host)
        if address is not None:
            return [address]
        found = [parse_address(text) for text in await self._resolve(host, port)]
        if not found or None in found:
            raise OSError(f"{host[:100]} has no address")
        return [address for address in found if address is not None]

    async def _is_service_network(self, host: str, kind: str) -> bool:
        """Return whether a host is the service's, or its kind of network is the service's."""
        if self._base is None:
            return False
        if host == self._base.host:
            return True
        if parse_address(self._base.host) is None and self._base.scheme == "https":
            return False
        if self._service_kinds is None:
            try:
                found = await self._resolve_addresses(self._base.host, self._base.port or 80)
            except OSError:
                return False
            self._service_kinds = {
                kind for kind in map(classify_address, found) if kind is not None
            }
        return kind in self._service_kinds


class GuardedTransport(AiohttpTransport):
    """Sends requests only to addresses that the guard allows. TLS verifies the host name.

    Behind a proxy of the environment (HTTPS_PROXY …), the proxy resolves names and must filter
    them. URLs with a private address are refused also there.

    Args:
        guard: Decides which addresses are allowed.
        socket_factory: Creates the socket for an address, for tests.
    """

    def __init__(
        self, guard: Guard, *, socket_factory: aiohttp.SocketFactoryType | None = None
    ) -> None:
        super().__init__(
            create_tls_context(), resolver=_GuardedResolver(guard), socket_factory=socket_factory
        )
        self._guard = guard
        self._proxied: dict[str, httpx.AsyncHTTPTransport] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request, unless its URL is not allowed.

        Raises:
            RefusedUrlError: The scheme or an address of the host is not allowed.
            httpx.TransportError: The request failed.
        """
        url = request.url
        if url.scheme not in _DEFAULT_PORTS or not url.host:
            raise RefusedUrlError(
                f"The URL has the scheme {url.scheme[:20]!r}; only http and https are allowed."
            )
        if proxy := _choose_proxy(url):
            return await self._get_proxy_transport(proxy).handle_async_request(request)
        host = url.raw_host.decode()
        if ":" in host or not any(map(str.isalpha, host)):  # aiohttp resolves names only
            try:
                await self._guard.resolve_allowed(host, url.port or _DEFAULT_PORTS[url.scheme])
            except OSError as error:
                raise httpx.ConnectError(str(error), request=request) from None
        return await super().handle_async_request(request)

    async def aclose(self) -> None:
        """Close all connections."""
        await super().aclose()
        for transport in self._proxied.values():
            await transport.aclose()

    def _get_proxy_transport(self, proxy: str) -> httpx.AsyncHTTPTransport:
        if proxy not in self._proxied:
            self._proxied[proxy] = create_proxy_transport(proxy)
        return self._proxied[proxy]


def _choose_proxy(url: httpx.URL) -> str | None:
    """Return the environment's proxy for a URL; None for a private address, for the guard."""
    address = parse_address(url.host)
    if address is not None and classify_address(address):
        return None
    return find_proxy(url)


class _GuardedResolver(AbstractResolver):
    """Resolver for aiohttp that returns only addresses that the guard allows."""

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
            for address in await self._guard.resolve_allowed(host, port)
        ]

    async def close(self) -> None:
        """Do nothing; there is nothing to close."""
