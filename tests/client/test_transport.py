"""The transport: its errors tell whether a request was sent, and it adds nothing to requests."""

import asyncio
import ssl

import httpx
import pytest

from prefect_flux_kontext.client import transport as transport_module
from prefect_flux_kontext.client.transport import (
    AiohttpTransport,
    create_proxy_transport,
    create_tls_context,
)
from tests.support import scripted_server as play
from tests.support.certificates import self_signed
from tests.support.fake_network import Network
from tests.support.scripted_server import ScriptedServer

pytestmark = pytest.mark.anyio

FINE = play.reply(200, b"fine")


def client(**options):
    transport = AiohttpTransport(create_tls_context(), **options)
    return httpx.AsyncClient(transport=transport, headers={"Authorization": "Bearer canary"})


@pytest.mark.parametrize("fault", [play.hang_up, play.reset], ids=["hang up", "reset"])
@pytest.mark.parametrize("kept", [False, True], ids=["new connection", "kept connection"])
async def test_post_is_sent_once_and_get_is_repeated_once(fault, kept):
    before = [FINE] * kept
    async with ScriptedServer(*before, fault, FINE) as server, client() as http:
        for _ in before:
            await http.get(server.url)
        with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
            await http.post(server.url, content=b"{}")
        assert [seen.method for seen in server.seen[kept:]] == ["POST"]
    async with ScriptedServer(*before, fault, FINE) as server, client() as http:
        for _ in before:
            await http.get(server.url)
        assert (await http.get(server.url)).content == b"fine"
        assert [seen.method for seen in server.seen[kept:]] == ["GET", "GET"]


async def test_refused_connection_raises_connect_error():
    network = Network(dead={"127.0.0.1"})
    async with client(socket_factory=network) as http:
        with pytest.raises(httpx.ConnectError, match=r"127\.0\.0\.1:80"):
            await http.post("http://127.0.0.1/", content=b"{}")
    assert network.connected == [("127.0.0.1", 80)]
    assert network.written == b""


async def test_untrusted_certificate_raises_before_sending(tmp_path):
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(self_signed("localhost", tmp_path))
    network = Network(tls=server)
    async with client(socket_factory=network) as http:
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            await http.post("https://127.0.0.1/", content=b"{}")
    assert network.written == b""


async def test_full_connection_pool_raises_connect_timeout(monkeypatch):
    monkeypatch.setattr(transport_module, "_MAX_CONNECTIONS", 1)
    received = asyncio.Event()

    async def record_and_hang(writer):
        received.set()
        return await play.silence(writer)

    async with ScriptedServer(record_and_hang) as server, client() as http:
        timeout = httpx.Timeout(60, pool=0.01)
        first = asyncio.create_task(http.get(server.url))
        await received.wait()
        with pytest.raises(httpx.ConnectTimeout):
            await http.post(server.url, content=b"{}", timeout=timeout)
        first.cancel()
        assert len(server.seen) == 1


async def test_missing_reply_raises_read_timeout():
    async with ScriptedServer(play.silence) as server, client() as http:
        with pytest.raises(httpx.ReadTimeout):
            await http.post(server.url, content=b"{}", timeout=httpx.Timeout(60, read=0.01))
        assert len(server.seen) == 1


async def test_half_a_reply_raises_remote_protocol_error():
    async with ScriptedServer(play.half_a_reply()) as server, client() as http:
        with pytest.raises(httpx.RemoteProtocolError):
            await http.post(server.url, content=b"{}")
        assert len(server.seen) == 1


async def test_error_of_a_reply_that_is_not_http_has_no_headers():
    network = Network(b"SSH-2.0-canary\r\n\r\n")
    async with client(socket_factory=network) as http:
        with pytest.raises(httpx.RemoteProtocolError) as raised:
            await http.post("http://127.0.0.1/", content=b"{}")
    assert "Bearer" not in str(raised.value)
    assert raised.value.__cause__ is None


@pytest.mark.parametrize("turns", [0, 1, 10])
@pytest.mark.parametrize("unsolicited", [b"HTTP/1.1 429 No\r\nContent-Length: 0\r\n\r\n", b"x"])
async def test_unsolicited_reply_is_not_used(turns, unsolicited):
    """It could report that a paid submit was refused, or name another task."""
    writers = []

    async def first(writer):
        writers.append(writer)
        return await FINE(writer)

    async with ScriptedServer(first, play.reply(200, b"second")) as server, client() as http:
        assert (await http.post(server.url, content=b"1")).content == b"fine"
        writers[0].write(unsolicited)
        for _ in range(turns):
            await asyncio.sleep(0)
        assert (await http.post(server.url, content=b"2")).content == b"second"
        assert [seen.body for seen in server.seen] == [b"1", b"2"]
        assert server.connections == 2


async def test_many_and_long_reply_headers_are_accepted():
    many = {f"X-{number}": "x" for number in range(500)} | {"X-Long": "x" * 60_000}
    async with ScriptedServer(play.reply(200, b"fine", **many)) as server, client() as http:
        assert (await http.post(server.url, content=b"{}")).content == b"fine"


async def test_invalid_host_name_raises_connect_error():
    async with client(socket_factory=Network()) as http:
        with pytest.raises(httpx.ConnectError):
            await http.post(f"http://{'a' * 64}.test/", content=b"{}")


async def test_cookies_are_not_kept_and_redirects_not_followed():
    moved = play.reply(302, Location="/elsewhere", **{"Set-Cookie": "who=me"})
    async with ScriptedServer(moved, FINE) as server, client() as http:
        transport = http._transport
        for _ in range(2):
            request = httpx.Request("GET", server.url)
            await (await transport.handle_async_request(request)).aread()
        assert [seen.target for seen in server.seen] == ["/", "/"]
        assert "cookie" not in server.seen[1].headers


async def test_no_header_is_added_to_the_request():
    async with ScriptedServer(FINE) as server:
        transport = AiohttpTransport(create_tls_context())
        request = httpx.Request("POST", f"{server.url}/a%20b?c=%2F&d", content=b"{}")
        await (await transport.handle_async_request(request)).aread()
        await transport.aclose()
        (seen,) = server.seen
        assert seen.target == "/a%20b?c=%2F&d"
        assert set(seen.headers) == {"host", "content-length"}


async def test_connection_is_reused_unless_a_body_is_unread():
    async with ScriptedServer(play.reply(200, b"x" * 500_000)) as server:
        transport = AiohttpTransport(create_tls_context())

        async def fetch(*, read):
            response = await transport.handle_async_request(httpx.Request("GET", server.url))
            if read:
                await response.aread()
            await response.aclose()
            return server.connections

        assert [await fetch(read=True), await fetch(read=True)] == [1, 1]
        assert [await fetch(read=False), await fetch(read=True)] == [1, 2]
        await transport.aclose()


@pytest.mark.parametrize("url", ["http://[::1]:8000/x", "http://user:word@127.0.0.1:8000/x"])
async def test_ip_address_is_used_and_no_login_is_sent(url):
    network = Network()
    transport = AiohttpTransport(create_tls_context(), socket_factory=network)
    response = await transport.handle_async_request(httpx.Request("GET", url))
    assert await response.aread() == b"fine"
    await transport.aclose()
    assert network.connected == [("::1" if "::1" in url else "127.0.0.1", 8000)]
    assert b"authorization" not in network.written.lower()


async def test_unused_transport_can_be_closed():
    transport = AiohttpTransport(create_tls_context())
    await transport.aclose()
    assert transport._session is None


async def test_connections_that_speak_first_are_given_up_unsent():
    connections = []

    async def greet(reader, writer):
        connections.append(writer)
        writer.write(b"220 ready\r\n")
        await writer.drain()
        await reader.read()
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as server, client() as http:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        with pytest.raises(httpx.ConnectError, match="before the request"):
            await http.post(url, content=b"{}")
    assert len(connections) <= 20


@pytest.mark.parametrize(
    "answer",
    [play.hang_up, play.reset, play.html(502), play.html(407), play.reply(200, b"no tunnel")],
    ids=["closed", "reset", "502", "407", "tunnel to nothing"],
)
async def test_proxy_that_opens_no_tunnel_is_a_connect_error(answer):
    async with ScriptedServer(answer) as proxy:
        transport = create_proxy_transport(proxy.url)
        async with httpx.AsyncClient(transport=transport) as http:
            with pytest.raises((httpx.ConnectError, httpx.ProxyError)):
                await http.post("https://service.invalid/", content=b"{}")
    assert {seen.method for seen in proxy.seen} == {"CONNECT"}


async def test_reply_lost_inside_a_tunnel_is_not_a_connect_error():
    async with ScriptedServer(play.hang_up) as proxy:
        # Requests for http go through the proxy without a tunnel, so it receives the POST itself.
        transport = create_proxy_transport(proxy.url)
        async with httpx.AsyncClient(transport=transport) as http:
            with pytest.raises(httpx.RemoteProtocolError):
                await http.post("http://service.invalid/", content=b"{}")
    assert [seen.method for seen in proxy.seen] == ["POST"]
