"""Downloads connect to public addresses only.

Nothing but loopback is resolved or reached here: names have fake addresses, and connections to
addresses end in this process.
"""

import asyncio
import ssl

import httpx
import pytest

from prefect_flux_kontext.client.transport import create_tls_context
from prefect_flux_kontext.errors import RefusedUrlError
from prefect_flux_kontext.images.ssrf import AddressGuard, GuardedTransport, resolve
from tests.support import scripted_server as play
from tests.support.certificates import self_signed
from tests.support.fake_network import Names, Network, open_guarded_client, redirect
from tests.support.scripted_server import ScriptedServer

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


REFUSED = [
    "file:///etc/passwd",
    "ftp://cdn.test/a.jpg",
    "gopher://cdn.test/a.jpg",
    "data:image/png;base64,AAAA",
    "http://127.0.0.1/a.jpg",
    "http://127.0.0.1:8080/a.jpg",
    "https://127.0.0.1/a.jpg",
    "http://[::1]/a.jpg",
    "http://0.0.0.0/a.jpg",
    "http://10.0.0.1/a.jpg",
    "http://172.16.5.4/a.jpg",
    "http://192.168.0.1/a.jpg",
    "http://100.64.1.1/a.jpg",
    "http://169.254.169.254/latest/meta-data/",
    "http://[fd00:ec2::254]/latest/meta-data/",
    "http://[fe80::1]/a.jpg",
    "http://[fd12::1]/a.jpg",
    "http://224.0.0.1/a.jpg",
    "http://[ff02::1]/a.jpg",
    "http://[::ffff:127.0.0.1]/a.jpg",
    "http://[::ffff:a9fe:a9fe]/a.jpg",
    "http://[64:ff9b::7f00:1]/a.jpg",
    "http://[2002:7f00:1::]/a.jpg",
    "http://2130706433/a.jpg",
    "http://0x7f000001/a.jpg",
    "http://0x7f.1/a.jpg",
    "http://127.1/a.jpg",
    "http://inside.test/a.jpg",
    "http://half-inside.test/a.jpg",
    "http://metadata.test/latest/meta-data/",
    "http://mapped.test/a.jpg",
    "http://user:password@inside.test/a.jpg",
]


@pytest.mark.parametrize("url", REFUSED)
@pytest.mark.parametrize("how", ["directly", "by a redirect"])
async def test_non_public_url_is_refused_and_not_reached(url, how):
    network = Network(redirect(url))
    # httpx itself rejects a redirect to an invalid URL.
    errors = (RefusedUrlError, httpx.InvalidURL) if "data:" in url else RefusedUrlError
    async with open_guarded_client(network) as http:
        with pytest.raises(errors):
            await http.get(url if how == "directly" else "http://cdn.test/first")
    assert network.connected == ([] if how == "directly" else [("93.184.215.14", 80)])


@pytest.mark.parametrize("url", ["http://0177.0.0.1/", "http://017700000001/"])
async def test_address_that_httpx_rejects_is_not_reached(url):
    network = Network()
    async with open_guarded_client(network) as http:
        with pytest.raises((RefusedUrlError, httpx.InvalidURL)):
            await http.get(url)
    assert network.connected == []


async def test_public_name_is_connected_at_its_checked_address():
    network, names = Network(), Names()
    async with open_guarded_client(network, names) as http:
        reply = await http.get("http://cdn.test/a.jpg?x=1")
        assert (reply.status_code, reply.content) == (200, b"fine")
    assert network.connected == [("93.184.215.14", 80)]
    assert names.asked == ["cdn.test"]
    assert network.written.startswith(b"GET /a.jpg?x=1 HTTP/1.1\r\nHost: cdn.test\r\n")


@pytest.mark.parametrize("name", ["cdn.test", "other.test"])
async def test_https_verifies_the_certificate_of_the_name(name, tmp_path, monkeypatch):
    certificate = self_signed(name, tmp_path)
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(certificate)
    client = ssl.create_default_context(cafile=str(certificate))
    monkeypatch.setattr("prefect_flux_kontext.images.ssrf.create_tls_context", lambda: client)
    network = Network(tls=server)
    async with open_guarded_client(network) as http:
        if name == "cdn.test":
            assert (await http.get("https://cdn.test/a.jpg")).content == b"fine"
        else:
            with pytest.raises(httpx.ConnectError, match="Hostname mismatch"):
                await http.get("https://cdn.test/a.jpg")
    assert network.connected == [("93.184.215.14", 443)]


def test_tls_context_requires_certificates():
    context = create_tls_context()
    assert (context.check_hostname, context.verify_mode) == (True, ssl.CERT_REQUIRED)


async def test_dns_rebinding_does_not_change_the_address():
    """The checked address is the one that is connected to, although the name changes."""

    class Rebinding(Names):
        async def __call__(self, host, port):
            found = list(await super().__call__(host, port))
            self.names[host] = ["127.0.0.1"]
            return found

    names = Rebinding()
    network = Network(b"HTTP/1.1 302 Found\r\nLocation: /second\r\nConnection: close\r\n"
                      b"Content-Length: 0\r\n\r\n")  # fmt: skip
    async with open_guarded_client(network, names) as http:
        with pytest.raises(RefusedUrlError, match="loopback"):
            await http.get("http://cdn.test/first")
    assert network.connected == [("93.184.215.14", 80)]


async def test_next_address_is_tried_if_one_is_dead():
    network = Network(dead={"93.184.215.14"})
    async with open_guarded_client(network) as http:
        assert (await http.get("http://two.test/")).status_code == 200
    assert [host for host, _ in network.connected] == ["93.184.215.14", "93.184.215.15"]


async def test_unreachable_host_is_a_connect_error():
    network = Network(dead={"93.184.215.14"})
    async with open_guarded_client(network) as http:
        for host in ("nowhere.test", "unknown.test", "cdn.test"):
            with pytest.raises(httpx.ConnectError):
                await http.get(f"http://{host}/")


@pytest.mark.virtual_time
async def test_slow_name_resolution_times_out():
    async def never(_host, _port):
        await asyncio.Event().wait()

    transport = GuardedTransport(AddressGuard(None, never), socket_factory=Network())
    async with httpx.AsyncClient(transport=transport, timeout=5) as http:
        with pytest.raises(httpx.ConnectTimeout):
            await http.get("http://cdn.test/")


LOCAL = [
    ("http://127.0.0.1:8765", "http://127.0.0.1:9999/a.jpg", True),
    ("http://127.0.0.1:8765", "http://[::1]/a.jpg", True),
    ("http://127.0.0.1:8765", "http://mapped.test/a.jpg", True),
    ("http://127.0.0.1:8765", "http://10.0.0.1/a.jpg", False),
    ("http://127.0.0.1:8765", "http://169.254.169.254/", False),
    ("http://127.0.0.1:8765", "file:///etc/passwd", False),
    ("http://inside.test:8765", "http://10.9.9.9/a.jpg", True),
    ("http://inside.test:8765", "http://192.168.0.1/a.jpg", False),
    ("http://inside.test:8765", "http://127.0.0.1/a.jpg", False),
    ("http://169.254.1.1", "http://169.254.169.254/", False),
    ("https://cdn.test", "http://10.0.0.1/a.jpg", False),
    ("https://inside.test", "https://inside.test/a.jpg", True),
    ("https://inside.test", "http://10.9.9.9/a.jpg", False),
    ("http://unknown.test", "http://10.9.9.9/a.jpg", False),
    ("https://metadata.test", "https://metadata.test/", False),
    ("http://cdn.test", "http://cdn.test/a.jpg", True),
]


@pytest.mark.parametrize(("base_url", "url", "allowed"), LOCAL)
async def test_private_service_may_have_results_on_its_network(base_url, url, allowed):
    network = Network()
    async with open_guarded_client(network, base_url=base_url) as http:
        if allowed and url.startswith("https"):
            with pytest.raises(httpx.ConnectError):  # the server does not speak TLS
                await http.get(url)
        elif allowed:
            assert (await http.get(url)).status_code == 200
        else:
            with pytest.raises(RefusedUrlError):
                await http.get(url)
    assert len(network.connected) == allowed


async def test_https_service_is_not_resolved():
    names = Names()
    async with open_guarded_client(Network(), names, "https://unknown.test") as http:
        with pytest.raises(RefusedUrlError):
            await http.get("http://10.0.0.1/a.jpg")
    assert names.asked == []


async def test_refusal_names_the_address_without_the_query():
    async with open_guarded_client(Network()) as http:
        with pytest.raises(RefusedUrlError) as raised:
            await http.get("http://inside.test/a.jpg?signature=canary")
    message = str(raised.value)
    assert "inside.test" in message
    assert "10.0.0.7 (private 10.0.0.0/8)" in message
    assert "canary" not in message
    assert not raised.value.retryable


async def test_real_connection_raises_httpx_errors():
    async with (
        ScriptedServer(
            play.reply(200, b"fine"),
            *(play.hang_up, play.hang_up, play.reset, play.reset),  # a GET is repeated
            play.half_a_reply(),
        ) as server,
        open_guarded_client(base_url=server.url) as http,
    ):
        assert (await http.get(server.url)).content == b"fine"
        for error in (httpx.RemoteProtocolError, httpx.ReadError, httpx.RemoteProtocolError):
            with pytest.raises(error):
                await http.get(server.url)
        assert all(seen.headers["host"] in server.url for seen in server.seen)


async def test_resolve_returns_loopback_addresses():
    assert "127.0.0.1" in await resolve("127.0.0.1", 80)


async def test_proxy_is_used_and_private_addresses_are_refused(monkeypatch):
    async with ScriptedServer(play.reply(200, b"by proxy")) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        network, names = Network(), Names()
        async with open_guarded_client(network, names) as http:
            reply = await http.get("http://cdn.test/a.jpg")
            assert reply.content == b"by proxy"
            for url in ("http://10.0.0.1/a.jpg", "file:///etc/passwd"):
                with pytest.raises(RefusedUrlError):
                    await http.get(url)
        assert [seen.target for seen in proxy.seen] == ["http://cdn.test/a.jpg"]
        assert (network.connected, names.asked) == ([], [])
        monkeypatch.setenv("no_proxy", "cdn.test")
        async with open_guarded_client(network, names) as http:
            assert (await http.get("http://cdn.test/a.jpg")).content == b"fine"


async def test_private_sandbox_bypasses_the_proxy(monkeypatch):
    async with ScriptedServer(play.reply(200, b"fine")) as server:
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
        async with open_guarded_client(base_url=server.url) as http:
            assert (await http.get(server.url)).content == b"fine"
