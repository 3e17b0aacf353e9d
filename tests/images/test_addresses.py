"""Addresses are recognized in every notation and inside of IPv6 addresses."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_flux_kontext.client.addresses import (
    classify_host,
    classify_non_public,
    is_loopback_host,
    is_public_host,
    parse_address,
)

NOTATIONS = {
    "127.0.0.1": [
        "127.0.0.1", "2130706433", "0x7f000001", "0x7f.0x0.0x0.0x1", "017700000001", "0177.0.0.1",
        "127.1", "127.0.1", "0x7f.1",
    ],
    "169.254.169.254": ["169.254.169.254", "2852039166", "0xa9fea9fe", "0251.0376.0251.0376"],
    "10.0.0.1": ["10.0.0.1", "10.1", "167772161", "012.0.0.1"],
    "::1": ["::1", "[::1]", "0:0:0:0:0:0:0:1"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("address", "notation"), [(a, notation) for a, each in NOTATIONS.items() for notation in each]
)
def test_parse_address_accepts_every_notation(address, notation):
    assert parse_address(notation) == ipaddress.ip_address(address)


@pytest.mark.parametrize(
    "name", ["localhost", "example.com", "127.0.0.1.example", "", "0x", "1.2.3.4.5"]
)
def test_parse_address_returns_none_for_names(name):
    assert parse_address(name) is None


KINDS = {
    "127.0.0.1": "loopback",
    "127.255.255.254": "loopback",
    "::1": "loopback",
    "10.1.2.3": "private 10.0.0.0/8",
    "172.16.0.1": "private 172.16.0.0/12",
    "172.31.255.255": "private 172.16.0.0/12",
    "192.168.1.1": "private 192.168.0.0/16",
    "fd12:3456::1": "private fc00::/7",
    "100.64.0.1": "carrier-grade NAT",
    "100.127.255.255": "carrier-grade NAT",
    "169.254.1.1": "link-local",
    "fe80::1": "link-local",
    "fe80::1%eth0": "link-local",
    "fec0::1": "site-local",
    "224.0.0.1": "multicast",
    "239.255.255.250": "multicast",
    "ff02::1": "multicast",
    "0.0.0.0": "unspecified",
    "0.1.2.3": "unspecified",
    "::": "unspecified",
    "255.255.255.255": "reserved",
    "240.0.0.1": "reserved",
    "192.0.2.1": "reserved",
    "198.18.0.1": "reserved",
    "2001:db8::1": "reserved",
    "169.254.169.254": "cloud metadata service",
    "168.63.129.16": "cloud metadata service",
    "100.100.100.200": "cloud metadata service",
    "fd00:ec2::254": "cloud metadata service",
    "::ffff:127.0.0.1": "loopback",
    "::ffff:169.254.169.254": "cloud metadata service",
    "::ffff:0:10.0.0.1": "private 10.0.0.0/8",
    "::7f00:1": "loopback",
    "64:ff9b::127.0.0.1": "loopback",
    "64:ff9b::a9fe:a9fe": "cloud metadata service",
    "64:ff9b:1::1": "translated",
    "2002:7f00:1::": "loopback",
    "2002:a9fe:a9fe::1": "cloud metadata service",
    "2002:c0a8:101::1": "private 192.168.0.0/16",
    "2001:0:7f00:1::": "translated",
    "8.8.8.8": None,
    "172.32.0.1": None,
    "100.128.0.1": None,
    "2606:4700::1111": None,
    "::ffff:8.8.8.8": None,
    "64:ff9b::808:808": None,
    "2002:808:808::1": None,
}


@pytest.mark.parametrize(("address", "kind"), KINDS.items())
def test_non_public_addresses_have_a_kind(address, kind):
    assert classify_non_public(ipaddress.ip_address(address)) == kind


@given(st.integers(0, 2**32 - 1))
def test_ipv4_in_ipv6_is_classified_as_ipv4(number):
    inside = ipaddress.IPv4Address(number)
    for wrapped in (0xFFFF << 32 | number, 0x64FF9B << 96 | number, 0x2002 << 112 | number << 80):
        assert classify_non_public(ipaddress.IPv6Address(wrapped)) == classify_non_public(inside)


@given(st.ip_addresses())
def test_addresses_that_python_calls_local_are_not_public(address):
    # Those with an IPv4 address inside count as that one; newer Pythons call all of 6to4 local.
    inside = address.version == 6 and (address.ipv4_mapped or address.sixtofour)
    if (not address.is_global or address.is_multicast) and not inside:
        assert classify_non_public(address) is not None


@pytest.mark.parametrize(
    ("host", "kind"),
    [
        ("localhost", "loopback"),
        ("LOCALHOST.", "loopback"),
        ("x.localhost", "loopback"),
        ("x.localhost.", "loopback"),
        ("127.1", "loopback"),
        ("127.0.0.1.", "loopback"),
        ("2130706433", "loopback"),
        ("0177.0.0.1", "loopback"),
        ("0x7f.0.0.1", "loopback"),
        ("::1", "loopback"),
        ("[::1]", "loopback"),
        ("::ffff:127.0.0.1", "loopback"),
        ("::ffff:7f00:1", "loopback"),
        ("127\u30020\u30020\uff0e1", "loopback"),
        ("\uff11\uff12\uff17.0.0.1", "loopback"),
        ("\uff4c\uff4f\uff43alhost", "loopback"),
        ("0.0.0.0", "unspecified"),
        ("::", "unspecified"),
        ("::ffff:10.0.0.1", "private 10.0.0.0/8"),
        ("fe80::1%eth0", "link-local"),
        ("169.254.169.254", "cloud metadata service"),
        ("::ffff:a9fe:a9fe", "cloud metadata service"),
        ("sandbox", "private"),
        ("", "private"),
        (None, "private"),
        ("flux.internal", "private"),
        ("NAS.local.", "private"),
        ("printer.home.arpa", "private"),
        ("service.test", "private"),
        ("home.arpa.example.com", None),
        ("localhost.example.com", None),
        ("127.0.0.1.example.com", None),
        ("xlocalhost.com", None),
        ("8.8.8.8", None),
        ("2606:4700::1111", None),
        ("172.32.0.1", None),
    ],
)
def test_host_is_judged_by_its_text(host, kind):
    assert classify_host(host) == kind
    assert is_loopback_host(host) is (kind == "loopback")
    assert is_public_host(host) is (kind is None)
