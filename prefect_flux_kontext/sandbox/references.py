"""Reference images: fetching, checking and caching."""

from __future__ import annotations

import asyncio
import hashlib
import io
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Generic, NamedTuple, TypeVar

import httpx
from PIL import Image, ImageOps

T = TypeVar("T")


class SharedCache(Generic[T]):
    """An LRU cache of `capacity` bytes that makes each value once.

    Concurrent callers wait for the same value. All of them get its failure, which is not kept,
    nor is a value larger than the cache.
    """

    def __init__(self, capacity: int, weigh: Callable[[T], int]) -> None:
        self._capacity = capacity
        self._weigh = weigh
        self._values: OrderedDict[Hashable, T] = OrderedDict()
        self._weight = 0
        self._making: dict[Hashable, asyncio.Future[T]] = {}

    def peek(self, key: Hashable) -> T | None:
        """Return the cached value of the key, or None."""
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    async def get(self, key: Hashable, make: Callable[[], Awaitable[T]]) -> T:
        """Return the cached value of the key, or make and cache it."""
        value = self.peek(key)
        if value is not None:
            return value
        if key not in self._making:
            self._making[key] = asyncio.ensure_future(self._make(key, make))
        # Shielded: a client that disconnects must not cancel the value of the others.
        return await asyncio.shield(self._making[key])

    async def _make(self, key: Hashable, make: Callable[[], Awaitable[T]]) -> T:
        try:
            value = await make()
        finally:
            del self._making[key]
        weight = self._weigh(value)
        if weight <= self._capacity:
            self._values[key] = value
            self._weight += weight
            while self._weight > self._capacity:
                _, dropped = self._values.popitem(last=False)
                self._weight -= self._weigh(dropped)
        return value

    def clear(self) -> None:
        """Drop all values."""
        self._values.clear()
        self._weight = 0


def outbound_client(connections: int) -> httpx.AsyncClient:
    """Create a client that uses no proxy for loopback and keeps no idle connection.

    Without idle connections the client needs no closing. In process, through an ASGI
    transport, the sandbox would not know when to close it. Callers set the time-out.
    """
    return httpx.AsyncClient(
        limits=httpx.Limits(max_connections=connections, max_keepalive_connections=0),
        mounts={f"all://{host}": None for host in ("127.0.0.1", "localhost", "[::1]")},
        timeout=None,  # noqa: S113 - callers limit the whole exchange
    )


MAX_BYTES = 10 * 1024 * 1024
"""Size limit of one reference in bytes, from the service's contract."""

MAX_PIXELS = 64_000_000
"""Limit of the sandbox: a small file must not unpack to more than the memory holds."""

_CACHE_BYTES = 128 * 1024 * 1024
_CONNECTIONS = 20


class BadReferenceError(Exception):
    """A reference cannot be fetched or is not an image that the service accepts."""


class Reference(NamedTuple):
    """A reference that was fetched and checked: the file's bytes and their SHA-256."""

    content: bytes
    digest: bytes


class References:
    """Fetches references once each and keeps a bounded number of bytes of them.

    The sandbox's own URLs are fetched in process, through `own`, so that they work without a
    socket and do not wait behind the requests of clients.
    """

    def __init__(self, own: httpx.AsyncBaseTransport, timeout: float) -> None:
        self._timeout = timeout
        self._own = httpx.AsyncClient(transport=own)
        self._outbound = outbound_client(_CONNECTIONS)
        self._cache = SharedCache[Reference](_CACHE_BYTES, lambda held: len(held.content))

    async def get(self, url: str, base_url: str) -> Reference:
        """Fetch and check the image at a URL; the base URL is that of the sandbox itself."""
        client = self._own if url.startswith(base_url + "/") else self._outbound
        return await self._cache.get(url, lambda: self._fetch(client, url))

    async def check(self, urls: Sequence[str], base_url: str) -> str | None:
        """Return the problem of the first bad reference, or None."""
        try:
            for url in urls:
                await self.get(url, base_url)
        except BadReferenceError as error:
            return str(error)
        return None

    def are_cached(self, urls: Sequence[str]) -> bool:
        """Return whether all references are cached."""
        return all(self._cache.peek(url) for url in urls)

    def clear(self) -> None:
        """Drop all cached references."""
        self._cache.clear()

    async def _fetch(self, client: httpx.AsyncClient, url: str) -> Reference:
        shown = url[:200]
        try:
            async with asyncio.timeout(self._timeout):
                content = await _download(client, url)
        except TimeoutError:
            raise BadReferenceError(f"{shown} took over {self._timeout:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise BadReferenceError(f"{shown} cannot be fetched: {error}") from None
        try:
            await asyncio.to_thread(open_image, content)
        except BadReferenceError as error:
            raise BadReferenceError(f"{shown} {error}") from None
        return Reference(content, hashlib.sha256(content).digest())


async def _download(client: httpx.AsyncClient, url: str) -> bytes:
    content = bytearray()
    async with client.stream("GET", url, follow_redirects=True) as response:
        response.raise_for_status()
        async for piece in response.aiter_bytes():
            content += piece
            if len(content) > MAX_BYTES:
                raise BadReferenceError(f"{url[:200]} is over 10 MB")
    return bytes(content)


def open_image(content: bytes, long_edge: int = 1024) -> Image.Image:
    """Decode a reference: upright, RGB, transparent parts on white.

    A JPG may be decoded smaller, but not below `long_edge` pixels.
    """
    try:
        picture: Image.Image = Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP"))
        small_enough = picture.width * picture.height <= MAX_PIXELS
        if small_enough:
            picture.draft("RGB", (long_edge, long_edge))
            picture = ImageOps.exif_transpose(picture)
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                white = Image.new("RGBA", picture.size, "white")
                picture = Image.alpha_composite(white, picture)
            picture = picture.convert("RGB")
    # Pillow raises many types of errors for invalid bytes.
    except Exception as error:
        raise BadReferenceError("is not a JPG, PNG or WebP image") from error
    if not small_enough:
        raise BadReferenceError("has too many pixels")
    return picture
