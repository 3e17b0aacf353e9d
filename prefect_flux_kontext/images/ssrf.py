"""Which addresses are nobody's business but this machine's or this network's. No I/O."""

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

_RANGES = {
    name: [ipaddress.ip_network(text) for text in networks]
    for name, *networks in (
        ("unspecified", "0.0.0.0/8", "::/128"),
        ("loopback", "127.0.0.0/8", "::1/128"),
        ("private 10.0.0.0/8", "10.0.0.0/8"),
        ("private 172.16.0.0/12", "172.16.0.0/12"),
        ("private 192.168.0.0/16", "192.168.0.0/16"),
        ("private fc00::/7", "fc00::/7"),
        ("shared by a carrier", "100.64.0.0/10"),
        ("link-local", "169.254.0.0/16", "fe80::/10"),
        ("site-local", "fec0::/10"),
        ("multicast", "224.0.0.0/4", "ff00::/8"),
        # NAT64 inside of a network, Teredo: what they lead to cannot be told.
        ("translated", "64:ff9b:1::/48", "2001::/32"),
    )
}
METADATA = "a cloud's metadata service"
_METADATA = {
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


def literal(host: str) -> Address | None:
    """The address that a host is, in any spelling that a resolver takes; None for a name.

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


def not_public(address: Address) -> str | None:
    """What kind of address it is, or None for one of the public internet.

    An IPv4 address inside an IPv6 address counts as itself.
    """
    if isinstance(address, ipaddress.IPv6Address):
        address = ipaddress.IPv6Address(int(address))  # without its scope
    if address in _METADATA:
        return METADATA
    for name, networks in _RANGES.items():
        if any(address in network for network in networks):
            return name
    if isinstance(address, ipaddress.IPv6Address):
        for network, shift in _IPV4_IN_IPV6:
            if address in network:
                return not_public(ipaddress.IPv4Address(int(address) >> shift & 0xFFFFFFFF))
    return None if address.is_global else "reserved"


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


class GuardedTransport(AiohttpTransport):
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
            create_tls_context(), resolver=_CheckedNames(guard), socket_factory=socket_factory
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
            self._proxied[proxy] = create_proxy_transport(proxy)
        return self._proxied[proxy]


def _proxy(url: httpx.URL) -> str | None:
    """The environment's proxy for a URL; none for a private address, which the guard judges."""
    address = literal(url.host)
    if address is not None and not_public(address):
        return None
    return find_proxy(url)


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
