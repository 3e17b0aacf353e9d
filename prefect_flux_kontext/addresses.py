"""Which addresses are nobody's business but this machine's or this network's. No I/O."""

from __future__ import annotations

import ipaddress
import socket

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
