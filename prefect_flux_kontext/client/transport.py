"""httpx's requests over aiohttp's connections, which take a third of the time of httpx's own."""

from __future__ import annotations

import asyncio
import functools
import urllib.request
import zlib
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Self, cast

import aiohttp
import httpx
from yarl import URL

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Iterator, Mapping

    from aiohttp.abc import AbstractResolver
    from aiohttp.connector import Connection

MOST_CONNECTIONS = 128
"""At full speed 33 submits and some 130 polls a second of 0.1 to 0.5 s each are under way."""

# An idle connection is dropped after 2 s, before servers do (5 s and up): a request sent into a
# connection that is just being closed has an unknown fate.
KEPT_IDLE = 2.0

# A paid submit's reply is not lost for what a proxy adds to it.
_LONGEST_HEADER = 65_536
_MOST_HEADERS = 1_000

# What a connection has received is read within two turns of the event loop.
_TURNS_UNTIL_READ = 2


class AiohttpTransport(httpx.AsyncBaseTransport):
    """Sends requests straight to their servers: no proxies, redirects, cookies or logins.

    What is raised tells what became of a submit. `httpx.ConnectError` and `httpx.ConnectTimeout`
    are raised only where no connection was made, so that nothing was sent. A POST is sent once;
    aiohttp sends a GET again whose connection was lost. Writing has no time limit of its own.

    Args:
        tls: For https.
        resolver: Finds the addresses of names; the system's by default.
        socket_factory: Makes the socket for an address; tests give another.
    """

    def __init__(
        self,
        tls: ssl.SSLContext,
        *,
        resolver: AbstractResolver | None = None,
        socket_factory: aiohttp.SocketFactoryType | None = None,
    ) -> None:
        self._tls = tls
        self._resolver = resolver
        self._socket_factory = socket_factory
        self._session: aiohttp.ClientSession | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; the response's body is still to be read.

        Raises:
            httpx.TransportError: It went wrong.
            httpx.InvalidURL: The URL is none; nothing was sent.
        """
        with _as_httpx(request):
            while True:
                try:
                    response = await self._sent(request)
                    break
                except _StaleResponseError:
                    continue
        return httpx.Response(
            response.status, headers=response.raw_headers, stream=_Body(response, request)
        )

    async def _sent(self, request: httpx.Request) -> aiohttp.ClientResponse:
        url = request.url
        asked = URL.build(
            scheme=url.scheme,
            authority=url.netloc.decode(),
            path=url.raw_path.decode().partition("?")[0],
            query_string=url.query.decode(),
            encoded=True,
        )
        seconds = request.extensions.get("timeout", {})
        return await self._opened().request(
            request.method,
            asked,
            headers=[
                (name.decode("ascii"), value.decode("latin-1"))
                for name, value in request.headers.raw
            ],
            data=await request.aread() or None,
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(
                total=None,
                connect=seconds.get("pool"),
                sock_connect=seconds.get("connect"),
                sock_read=seconds.get("read"),
            ),
        )

    async def aclose(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()

    def _opened(self) -> aiohttp.ClientSession:
        """The session, made on the loop that it is used on."""
        if self._session is None:
            connector = aiohttp.TCPConnector(
                limit=MOST_CONNECTIONS,
                keepalive_timeout=KEPT_IDLE,
                ssl=self._tls,
                resolver=self._resolver or aiohttp.ThreadedResolver(),
                use_dns_cache=False,
                socket_factory=self._socket_factory,
            )
            self._session = aiohttp.ClientSession(
                connector=connector,
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                request_class=_Request,
                max_line_size=_LONGEST_HEADER,
                max_field_size=_LONGEST_HEADER,
                max_headers=_MOST_HEADERS,
                skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
            )
        return self._session


class _StaleResponseError(Exception):
    """A kept connection holds a reply that nobody asked for; nothing was sent into it."""


class _Request(aiohttp.ClientRequest):
    """Is not sent into a connection whose next reply would be another's."""

    async def send(self, conn: Connection) -> aiohttp.ClientResponse:
        for _ in range(_TURNS_UNTIL_READ):
            await asyncio.sleep(0)
        if conn.protocol is None or conn.protocol.should_close:
            raise _StaleResponseError
        return await super().send(conn)


class _Body(httpx.AsyncByteStream):
    """A response's body."""

    def __init__(self, response: aiohttp.ClientResponse, request: httpx.Request) -> None:
        self._response = response
        self._request = request

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _as_httpx(self._request):
            async for piece in self._response.content.iter_any():
                yield piece

    async def aclose(self) -> None:
        # Closes the connection, unless the body was read to its end.
        self._response.close()


@contextmanager
def _as_httpx(request: httpx.Request) -> Iterator[None]:
    """Raise aiohttp's errors as httpx's.

    The first three are of a connection that was never made; whatever else goes wrong, the request
    may have arrived.
    """
    try:
        yield
    except aiohttp.ConnectionTimeoutError as error:
        raise httpx.ConnectTimeout(str(error), request=request) from None
    except aiohttp.ClientConnectorError as error:
        raise httpx.ConnectError(str(error), request=request) from None
    except UnicodeError as error:  # a name that no resolver is asked for
        raise httpx.ConnectError(str(error), request=request) from None
    except aiohttp.InvalidURL as error:
        raise httpx.InvalidURL(str(error)) from None
    except aiohttp.SocketTimeoutError as error:
        raise httpx.ReadTimeout(str(error), request=request) from None
    except aiohttp.ClientResponseError as error:
        # The error itself has the request's headers in it, and so the key.
        raise httpx.RemoteProtocolError(error.message, request=request) from None
    except (aiohttp.ServerDisconnectedError, aiohttp.ClientPayloadError) as error:
        raise httpx.RemoteProtocolError(str(error), request=request) from None
    except (aiohttp.ClientError, OSError) as error:
        raise httpx.ReadError(str(error), request=request) from None


_LARGEST_REPLY = 4 * 2**20
_REFUSALS = range(400, 500)

# A submit whose reply does not come may be billed without our knowing, so patience is cheap.
API_TIMEOUT = httpx.Timeout(connect=10, read=60, write=60, pool=60)
_LONGEST_REQUEST = 120.0


@functools.cache
def create_tls_context() -> ssl.SSLContext:
    """The process's one TLS context: making one reads all certificates, some 20 ms."""
    context = httpx.create_ssl_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


def find_proxy(url: httpx.URL) -> str | None:
    """The environment's proxy for a URL (HTTPS_PROXY …), unless NO_PROXY names its host."""
    proxies = urllib.request.getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if not proxy or urllib.request.proxy_bypass(url.host):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def create_proxy_transport(proxy: str) -> httpx.AsyncHTTPTransport:
    """A transport that sends all requests through a proxy; httpx's, which knows every kind."""
    limits = httpx.Limits(max_connections=MOST_CONNECTIONS, keepalive_expiry=KEPT_IDLE)
    return httpx.AsyncHTTPTransport(proxy=proxy, verify=create_tls_context(), limits=limits)


class Connections:
    """A transport with the headers and time limits that all requests to a server share.

    There is no `httpx.AsyncClient` above it: its cookies, redirects and logins are not needed
    here, and take two fifths of a request's time.

    Args:
        transport: Sends requests.
        timeout: For each step of a request.
        headers: Sent with each request.
    """

    def __init__(
        self,
        transport: httpx.AsyncBaseTransport,
        timeout: httpx.Timeout,
        headers: Mapping[str, str],
    ) -> None:
        self.timeout = timeout
        self._transport = transport
        self._closed = False
        self._headers = {"User-Agent": "prefect-flux-kontext", **headers}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections, for good."""
        self._closed = True
        await self._transport.aclose()

    @asynccontextmanager
    async def stream(
        self,
        method: str,
        url: str,
        *,
        json: object = None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[httpx.Response]:
        """Send a request and stream its response; a redirect is not followed."""
        request = httpx.Request(
            method,
            url,
            json=json,
            headers={**self._headers, **(headers or {})},
            extensions={"timeout": self.timeout.as_dict()},
        )
        if self._closed:  # a new connection would never be closed
            raise RuntimeError("The client has been closed.")
        response = await self._transport.handle_async_request(request)
        try:
            response.request = request
            yield response
        finally:
            await response.aclose()


def stream_response(response: httpx.Response) -> httpx.AsyncByteStream:
    """The body in the pieces in which it comes, packed as it is sent."""
    return cast("httpx.AsyncByteStream", response.stream)


async def send_request(
    connections: Connections, method: str, url: str, *, json: object = None
) -> tuple[int, httpx.Headers, bytes]:
    """Send a request and read its whole reply, but no more than 4 MB and for no more than 120 s.

    Returns:
        Status, headers and body.

    Raises:
        httpx.HTTPError: The request failed.
        TimeoutError: It took too long in all.
    """
    body = bytearray()
    async with (
        asyncio.timeout(_LONGEST_REQUEST),
        connections.stream(method, url, json=json) as response,
    ):
        try:
            async for chunk in stream_response(response):
                body += chunk
                if len(body) > _LARGEST_REPLY:
                    break
        except httpx.TransportError:
            if response.status_code not in _REFUSALS:
                raise  # a refusal is one without its body too
    return response.status_code, response.headers, _unpacked(bytes(body), response.headers)


def _unpacked(body: bytes, headers: httpx.Headers) -> bytes:
    """The body itself, from proxies too that compress it although we ask them not to."""
    if headers.get("Content-Encoding", "").strip().lower() not in ("gzip", "x-gzip", "deflate"):
        return body
    try:
        return zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(body, _LARGEST_REPLY)
    except zlib.error:
        return body
