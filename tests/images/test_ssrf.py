"""Downloads go to public addresses alone, whatever a URL says and a name resolves to.

Nothing here is resolved or reached but loopback: names have made-up addresses, and connections
to addresses end in this process.
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
from tests.support.made_up_network import Names, Network, guarded, redirect
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
@pytest.mark.parametrize("how", ["at once", "by a redirect"])
async def test_what_is_not_public_is_refused_and_never_reached(url, how):
    network = Network(redirect(url))
    # A redirect to what is no URL is refused by httpx.
    errors = (RefusedUrlError, httpx.InvalidURL) if "data:" in url else RefusedUrlError
    async with guarded(network) as http:
        with pytest.raises(errors):
            await http.get(url if how == "at once" else "http://cdn.test/first")
    assert network.connected == ([] if how == "at once" else [("93.184.215.14", 80)])


@pytest.mark.parametrize("url", ["http://0177.0.0.1/", "http://017700000001/"])
async def test_an_address_that_httpx_does_not_take_is_refused_too(url):
    network = Network()
    async with guarded(network) as http:
        with pytest.raises((RefusedUrlError, httpx.InvalidURL)):
            await http.get(url)
    assert network.connected == []


async def test_a_public_name_is_reached_at_the_address_that_was_looked_at():
    network, names = Network(), Names()
    async with guarded(network, names) as http:
        reply = await http.get("http://cdn.test/a.jpg?x=1")
        assert (reply.status_code, reply.content) == (200, b"fine")
    assert network.connected == [("93.184.215.14", 80)]
    assert names.asked == ["cdn.test"]
    assert network.written.startswith(b"GET /a.jpg?x=1 HTTP/1.1\r\nHost: cdn.test\r\n")


@pytest.mark.parametrize("name", ["cdn.test", "other.test"])
async def test_over_https_the_certificate_must_be_the_names(name, tmp_path, monkeypatch):
    certificate = self_signed(name, tmp_path)
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(certificate)
    client = ssl.create_default_context(cafile=str(certificate))
    monkeypatch.setattr("prefect_flux_kontext.images.ssrf.create_tls_context", lambda: client)
    network = Network(tls=server)
    async with guarded(network) as http:
        if name == "cdn.test":
            assert (await http.get("https://cdn.test/a.jpg")).content == b"fine"
        else:
            with pytest.raises(httpx.ConnectError, match="Hostname mismatch"):
                await http.get("https://cdn.test/a.jpg")
    assert network.connected == [("93.184.215.14", 443)]


def test_the_context_of_all_connections_asks_for_certificates():
    context = create_tls_context()
    assert (context.check_hostname, context.verify_mode) == (True, ssl.CERT_REQUIRED)


async def test_a_name_that_changes_its_address_leads_nowhere_else():
    """Rebinding: the address that was looked at is the one that is connected to."""

    class Rebinding(Names):
        async def __call__(self, host, port):
            found = list(await super().__call__(host, port))
            self.names[host] = ["127.0.0.1"]
            return found

    names = Rebinding()
    network = Network(b"HTTP/1.1 302 Found\r\nLocation: /second\r\nConnection: close\r\n"
                      b"Content-Length: 0\r\n\r\n")  # fmt: skip
    async with guarded(network, names) as http:
        with pytest.raises(RefusedUrlError, match="loopback"):
            await http.get("http://cdn.test/first")
    assert network.connected == [("93.184.215.14", 80)]


async def test_of_several_addresses_the_next_is_tried_where_one_does_not_answer():
    network = Network(dead={"93.184.215.14"})
    async with guarded(network) as http:
        assert (await http.get("http://two.test/")).status_code == 200
    assert [host for host, _ in network.connected] == ["93.184.215.14", "93.184.215.15"]


async def test_a_host_without_an_address_or_an_answer_is_a_failed_connection():
    network = Network(dead={"93.184.215.14"})
    async with guarded(network) as http:
        for host in ("nowhere.test", "unknown.test", "cdn.test"):
            with pytest.raises(httpx.ConnectError):
                await http.get(f"http://{host}/")


@pytest.mark.virtual_time
async def test_a_name_that_takes_too_long_to_resolve_is_a_time_out():
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
async def test_a_service_on_a_private_network_may_have_its_results_there(base_url, url, allowed):
    network = Network()
    async with guarded(network, base_url=base_url) as http:
        if allowed and url.startswith("https"):
            with pytest.raises(httpx.ConnectError):  # the server there speaks no TLS
                await http.get(url)
        elif allowed:
            assert (await http.get(url)).status_code == 200
        else:
            with pytest.raises(RefusedUrlError):
                await http.get(url)
    assert len(network.connected) == allowed


async def test_a_service_of_https_is_not_resolved_to_find_out_where_it_is():
    names = Names()
    async with guarded(Network(), names, "https://unknown.test") as http:
        with pytest.raises(RefusedUrlError):
            await http.get("http://10.0.0.1/a.jpg")
    assert names.asked == []


async def test_a_refusal_says_what_leads_where_and_keeps_the_query():
    async with guarded(Network()) as http:
        with pytest.raises(RefusedUrlError) as raised:
            await http.get("http://inside.test/a.jpg?signature=canary")
    told = str(raised.value)
    assert "inside.test" in told
    assert "10.0.0.7 (private 10.0.0.0/8)" in told
    assert "canary" not in told
    assert not raised.value.retryable


async def test_on_a_real_connection_errors_are_those_of_httpx():
    async with (
        ScriptedServer(
            play.reply(200, b"fine"),
            *(play.hang_up, play.hang_up, play.reset, play.reset),  # a GET is sent again
            play.half_a_reply(),
        ) as server,
        guarded(base_url=server.url) as http,
    ):
        assert (await http.get(server.url)).content == b"fine"
        for error in (httpx.RemoteProtocolError, httpx.ReadError, httpx.RemoteProtocolError):
            with pytest.raises(error):
                await http.get(server.url)
        assert all(seen.headers["host"] in server.url for seen in server.seen)


async def test_the_system_resolves_loopback_without_asking_anybody():
    assert "127.0.0.1" in await resolve("127.0.0.1", 80)


async def test_behind_a_proxy_the_proxy_is_asked_and_addresses_are_refused(monkeypatch):
    async with ScriptedServer(play.reply(200, b"by proxy")) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        network, names = Network(), Names()
        async with guarded(network, names) as http:
            reply = await http.get("http://cdn.test/a.jpg")
            assert reply.content == b"by proxy"
            for url in ("http://10.0.0.1/a.jpg", "file:///etc/passwd"):
                with pytest.raises(RefusedUrlError):
                    await http.get(url)
        assert [seen.target for seen in proxy.seen] == ["http://cdn.test/a.jpg"]
        assert (network.connected, names.asked) == ([], [])
        monkeypatch.setenv("no_proxy", "cdn.test")
        async with guarded(network, names) as http:
            assert (await http.get("http://cdn.test/a.jpg")).content == b"fine"


async def test_a_private_sandbox_behind_a_proxy_is_not_asked_of_it(monkeypatch):
    async with ScriptedServer(play.reply(200, b"fine")) as server:
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
        async with guarded(base_url=server.url) as http:
            assert (await http.get(server.url)).content == b"fine"
