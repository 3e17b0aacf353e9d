"""httpx's requests over aiohttp's connections, which take a third of the time of httpx's own."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING

import aiohttp
import httpx
from yarl import URL

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Iterator

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


class WireTransport(httpx.AsyncBaseTransport):
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
                except _UnaskedReplyError:
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


class _UnaskedReplyError(Exception):
    """A kept connection holds a reply that nobody asked for; nothing was sent into it."""


class _Request(aiohttp.ClientRequest):
    """Is not sent into a connection whose next reply would be another's."""

    async def send(self, conn: Connection) -> aiohttp.ClientResponse:
        for _ in range(_TURNS_UNTIL_READ):
            await asyncio.sleep(0)
        if conn.protocol is None or conn.protocol.should_close:
            raise _UnaskedReplyError
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
