"""Transport: httpx requests over aiohttp connections.

aiohttp's connections take a third of the time that httpx's own take. `AiohttpTransport` sends
requests, `Connections` adds headers and time limits, and `send_request` reads a whole reply.
"""

from __future__ import annotations

import asyncio
import functools
import urllib.request
import zlib
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, Self, cast

import aiohttp
import httpx
from yarl import URL

if TYPE_CHECKING:
    import ssl

    from aiohttp.abc import AbstractResolver
    from aiohttp.connector import Connection

# Seconds for each step of a request. The limits are generous, because a submit whose reply is
# not received may be billed without our knowledge.
API_TIMEOUT = httpx.Timeout(connect=10, read=60, write=60, pool=60)
_REQUEST_TIMEOUT_SECONDS = 120.0

# A timer that fires later than this belongs to a process that was frozen. Replies may be waiting
# in its sockets, and this long is enough to read them.
_LATE_SECONDS = 1.0

# At full speed, 33 submits and about 130 polls a second are in flight for 0.1 to 0.5 s each.
_MAX_CONNECTIONS = 128

# Idle connections are closed before servers close them (after 5 s or more): whether a request
# arrives that is sent into a closing connection is unknown.
_KEEPALIVE_SECONDS = 2.0

# Generous, so that headers added by a proxy do not make the reply to a paid submit unreadable.
_MAX_HEADER_BYTES = 65_536
_MAX_HEADERS = 1_000

_MAX_REPLY_BYTES = 4 * 2**20
_CLIENT_ERRORS = range(400, 500)

# A server that sends data before any request is no HTTP server. Nothing was sent to it.
_MAX_STALE_CONNECTIONS = 10

# By aiohttp's error, what is raised instead; the first that fits counts.
_HTTPX_ERRORS: tuple[tuple[Any, type[httpx.TransportError]], ...] = (
    # No connection was made. A UnicodeError is a host name that cannot be encoded.
    (aiohttp.ConnectionTimeoutError, httpx.ConnectTimeout),
    ((aiohttp.ClientConnectorError, UnicodeError), httpx.ConnectError),
    # The request may have arrived.
    (aiohttp.SocketTimeoutError, httpx.ReadTimeout),
    ((aiohttp.ClientResponseError, aiohttp.ClientPayloadError), httpx.RemoteProtocolError),
    (aiohttp.ServerDisconnectedError, httpx.RemoteProtocolError),
    ((aiohttp.ClientError, OSError), httpx.ReadError),
)

# The event loop reads what a connection has received within two iterations.
_LOOP_ITERATIONS_UNTIL_READ = 2


class AiohttpTransport(httpx.AsyncBaseTransport):
    """Transport that sends requests directly, without proxies, redirects, cookies or logins.

    Its errors tell whether a submit may have been accepted: `httpx.ConnectError` and
    `httpx.ConnectTimeout` are raised only if no connection was made, so nothing was sent. A POST
    is sent once; aiohttp repeats a GET whose connection was lost. Writing has no time limit.
    Tests pass a resolver or socket factory of their own.
    """

    def __init__(
        self,
        tls: ssl.SSLContext,
        *,
        max_header_bytes: int = _MAX_HEADER_BYTES,
        max_headers: int = _MAX_HEADERS,
        resolver: AbstractResolver | None = None,
        socket_factory: aiohttp.SocketFactoryType | None = None,
    ) -> None:
        self._tls = tls
        self._resolver = resolver
        self._socket_factory = socket_factory
        self._header_limits = max_header_bytes, max_headers
        self._session: aiohttp.ClientSession | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request and return the response, whose body is not read yet.

        Raises:
            httpx.TransportError: The request failed.
            httpx.InvalidURL: The URL is invalid. Nothing was sent.
        """
        with _translate_errors(request):
            for _ in range(_MAX_STALE_CONNECTIONS):
                try:
                    response = await self._send(request)
                    break
                except _StaleResponseError:
                    continue
            else:
                raise httpx.ConnectError(
                    f"{_MAX_STALE_CONNECTIONS} connections in a row sent data before the request",
                    request=request,
                )
        return httpx.Response(
            response.status,
            headers=response.raw_headers,
            stream=_ResponseStream(response, request),
        )

    async def aclose(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()

    async def _send(self, request: httpx.Request) -> aiohttp.ClientResponse:
        url = request.url
        target = URL.build(
            scheme=url.scheme,
            authority=url.netloc.decode(),
            path=url.raw_path.decode().partition("?")[0],
            query_string=url.query.decode(),
            encoded=True,
        )
        timeouts = request.extensions.get("timeout", {})
        return await self._get_session().request(
            request.method,
            target,
            headers=[
                (name.decode("ascii"), value.decode("latin-1"))
                for name, value in request.headers.raw
            ],
            data=await request.aread() or None,
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(
                total=None,
                connect=timeouts.get("pool"),
                sock_connect=timeouts.get("connect"),
                sock_read=timeouts.get("read"),
            ),
        )

    def _get_session(self) -> aiohttp.ClientSession:
        """Return the session, which the first request creates on its event loop."""
        if self._session is None:
            max_header_bytes, max_headers = self._header_limits
            connector = aiohttp.TCPConnector(
                limit=_MAX_CONNECTIONS,
                keepalive_timeout=_KEEPALIVE_SECONDS,
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
                max_line_size=max_header_bytes,
                max_field_size=max_header_bytes,
                max_headers=max_headers,
                skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
            )
        return self._session


class Connections:
    """A transport with the headers and timeouts that all requests to a server share.

    It replaces `httpx.AsyncClient`, whose cookies, redirects and logins are not needed here and
    take two fifths of the time of a request.
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
        self._loop: asyncio.AbstractEventLoop | None = None
        self._headers = {"User-Agent": "prefect-flux-kontext", **headers}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    def check_open(self) -> None:
        """Raise RuntimeError if the connections are closed, or belong to another event loop.

        On another loop a request could be sent, but its reply could not be read.
        """
        if self._closed:
            raise RuntimeError("The client is closed.")
        loop = asyncio.get_running_loop()
        self._loop = self._loop or loop
        if self._loop is not loop:
            raise RuntimeError(
                "The client belongs to another event loop. Nothing was sent. Create a new client "
                "in each asyncio.run()."
            )

    async def aclose(self) -> None:
        """Close all connections. Later requests fail."""
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
        """Send a request and stream its response. Redirects are not followed."""
        request = httpx.Request(
            method,
            url,
            json=json,
            headers={**self._headers, **(headers or {})},
            extensions={"timeout": self.timeout.as_dict()},
        )
        self.check_open()
        response = await self._transport.handle_async_request(request)
        try:
            response.request = request
            yield response
        finally:
            await response.aclose()


@functools.cache
def create_tls_context() -> ssl.SSLContext:
    """Return the process's TLS context. It is created once: loading certificates takes 20 ms."""
    context = httpx.create_ssl_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


def find_proxy(url: httpx.URL) -> str | None:
    """Return the environment's proxy for a URL (HTTPS_PROXY …), unless NO_PROXY has its host."""
    proxies = urllib.request.getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if not proxy or urllib.request.proxy_bypass(url.host):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def create_proxy_transport(proxy: str) -> httpx.AsyncHTTPTransport:
    """Create a transport that sends all requests through a proxy.

    It is httpx's own, which supports every kind of proxy, but raises `httpx.ConnectError` for
    every failure before the tunnel is open: the proxy has not passed on anything then.
    """
    limits = httpx.Limits(max_connections=_MAX_CONNECTIONS, keepalive_expiry=_KEEPALIVE_SECONDS)
    return _ProxyTransport(proxy=proxy, verify=create_tls_context(), limits=limits)


def stream_response(response: httpx.Response) -> httpx.AsyncByteStream:
    """Return the stream of a response's body as it arrives, without decompression."""
    return cast("httpx.AsyncByteStream", response.stream)


async def send_request(
    connections: Connections, method: str, url: str, *, json: object = None
) -> tuple[int, httpx.Headers, bytes]:
    """Send a request; return status, headers and at most 4 MB of body, in at most 120 s.

    Raises:
        httpx.HTTPError: The request failed.
        TimeoutError: The request and its reply took longer than 120 s.
    """
    body = bytearray()
    async with _limit_request(), connections.stream(method, url, json=json) as response:
        try:
            async for chunk in stream_response(response):
                body += chunk
                if len(body) > _MAX_REPLY_BYTES:
                    break
        except httpx.TransportError:
            # A refusal is known by its status, even if its body is incomplete.
            if response.status_code not in _CLIENT_ERRORS:
                raise
    return response.status_code, response.headers, _decompress(bytes(body), response.headers)


class _ProxyTransport(httpx.AsyncHTTPTransport):
    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        was_sent = False

        async def trace(event: str, info: Mapping[str, Any]) -> None:
            nonlocal was_sent
            if event.endswith("send_request_headers.started"):
                was_sent |= info["request"].method != b"CONNECT"

        request.extensions = {**request.extensions, "trace": trace}
        try:
            return await super().handle_async_request(request)
        except httpx.TransportError as error:
            if was_sent:
                raise
            raise httpx.ConnectError(str(error), request=request) from None


@asynccontextmanager
async def _limit_request() -> AsyncIterator[None]:
    """Limit a request to 120 s, and read once more what arrived while the process was frozen."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _REQUEST_TIMEOUT_SECONDS
    async with asyncio.timeout(None) as timeout:

        def expire() -> None:
            is_late = loop.time() > deadline + _LATE_SECONDS
            timeout.reschedule(loop.time() + (_LATE_SECONDS if is_late else 0.0))

        timer = loop.call_at(deadline, expire)
        try:
            yield
        finally:
            timer.cancel()


class _StaleResponseError(Exception):
    """A kept-alive connection holds a reply to no request of ours. Nothing was sent into it."""


class _Request(aiohttp.ClientRequest):
    """Request that is not sent into a connection which already holds another reply."""

    async def send(self, conn: Connection) -> aiohttp.ClientResponse:
        for _ in range(_LOOP_ITERATIONS_UNTIL_READ):
            await asyncio.sleep(0)
        if conn.protocol is None or conn.protocol.should_close:
            raise _StaleResponseError
        return await super().send(conn)


class _ResponseStream(httpx.AsyncByteStream):
    """The body of an aiohttp response as an httpx stream."""

    def __init__(self, response: aiohttp.ClientResponse, request: httpx.Request) -> None:
        self._response = response
        self._request = request

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _translate_errors(self._request):
            async for chunk in self._response.content.iter_any():
                yield chunk

    async def aclose(self) -> None:
        # Closes the connection, unless the body was read to its end.
        self._response.close()


@contextmanager
def _translate_errors(request: httpx.Request) -> Iterator[None]:
    """Raise aiohttp's errors as httpx's."""
    try:
        yield
    except aiohttp.InvalidURL as error:
        raise httpx.InvalidURL(str(error)) from None
    except (aiohttp.ClientError, OSError, UnicodeError) as error:
        # Only the message: a ClientResponseError holds the request's headers, and so the key.
        text = error.message if isinstance(error, aiohttp.ClientResponseError) else str(error)
        kind = next(kind for kinds, kind in _HTTPX_ERRORS if isinstance(error, kinds))
        raise kind(text, request=request) from None


def _decompress(body: bytes, headers: httpx.Headers) -> bytes:
    """Return the decompressed body: some proxies compress it although we ask them not to."""
    if headers.get("Content-Encoding", "").strip().lower() not in ("gzip", "x-gzip", "deflate"):
        return body
    try:
        return zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(body, _MAX_REPLY_BYTES)
    except zlib.error:
        return body
