"""Which hosts and addresses are public: the one rule for all that is sent or fetched."""

from __future__ import annotations

import ipaddress
import socket
import unicodedata

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

LOOPBACK = "loopback"
METADATA_SERVICE = "cloud metadata service"

# Domains that no public registry has, as in RFC 6761 and 8375.
_PRIVATE_DOMAINS = frozenset({"internal", "intranet", "lan", "local", "test"})
_HOME_DOMAIN = ["home", "arpa"]

_RANGES = {
    name: [ipaddress.ip_network(text) for text in networks]
    for name, *networks in (
        ("unspecified", "0.0.0.0/8", "::/128"),
        (LOOPBACK, "127.0.0.0/8", "::1/128"),
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


def classify_host(host: str | None) -> str | None:
    """Return the kind of a host that is not public, or None; judged by its text alone.

    A name is not resolved: one that looks public can lead to a private address.
    """
    # Clients read other full stops and digits as the usual ones.
    name = unicodedata.normalize("NFKC", host or "").replace("\u3002", ".").lower().rstrip(".")
    address = parse_address(name)
    if address is not None:
        return classify_non_public(address)
    labels = name.split(".")
    if labels[-1] == "localhost":
        return LOOPBACK
    is_private = len(labels) == 1 or labels[-1] in _PRIVATE_DOMAINS or labels[-2:] == _HOME_DOMAIN
    return "private" if is_private else None


def is_loopback_host(host: str | None) -> bool:
    """Whether a host is this machine."""
    return classify_host(host) == LOOPBACK


def is_public_host(host: str | None) -> bool:
    """Whether a host may be reached from the internet."""
    return classify_host(host) is None
