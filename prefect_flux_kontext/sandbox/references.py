"""A cache that is bounded in bytes and makes each thing once."""

from __future__ import annotations

import asyncio
import hashlib
import io
from collections import OrderedDict
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import httpx
from PIL import Image, ImageOps

from prefect_flux_kontext.sandbox.outbound import outbound_client

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Hashable, Sequence

T = TypeVar("T")


class SharedCache(Generic[T]):
    """Least recently used goes first; whoever asks for a thing in the making waits for it.

    A failure reaches everybody who waits and is not kept.

    Args:
        capacity: Bytes held at most (a single larger thing is handed out but not kept).
        weigh: Bytes of one thing.
    """

    def __init__(self, capacity: int, weigh: Callable[[T], int]) -> None:
        self._capacity = capacity
        self._weigh = weigh
        self._held: OrderedDict[Hashable, T] = OrderedDict()
        self._weight = 0
        self._making: dict[Hashable, asyncio.Future[T]] = {}

    def peek(self, key: Hashable) -> T | None:
        """What is held under the key, now."""
        thing = self._held.get(key)
        if thing is not None:
            self._held.move_to_end(key)
        return thing

    async def get(self, key: Hashable, make: Callable[[], Awaitable[T]]) -> T:
        """What is held under the key, else what `make` makes."""
        thing = self.peek(key)
        if thing is not None:
            return thing
        making = self._making.get(key)
        if making is None:
            making = asyncio.ensure_future(self._make(key, make))
            self._making[key] = making
        # Shielded: one client that hangs up must not take the thing from the others.
        return await asyncio.shield(making)

    async def _make(self, key: Hashable, make: Callable[[], Awaitable[T]]) -> T:
        try:
            thing = await make()
        finally:
            del self._making[key]
        weight = self._weigh(thing)
        if weight <= self._capacity:
            self._held[key] = thing
            self._weight += weight
            while self._weight > self._capacity:
                _, dropped = self._held.popitem(last=False)
                self._weight -= self._weigh(dropped)
        return thing

    def clear(self) -> None:
        """Forget everything held."""
        self._held.clear()
        self._weight = 0


MAX_BYTES = 10 * 1024 * 1024
"""The contract's limit for one reference."""

MAX_PIXELS = 64_000_000
"""Ours: a small file must not unpack to more than the machine has."""

_CACHED_BYTES = 128 * 1024 * 1024
_CONNECTIONS = 20


class BadReferenceError(Exception):
    """A reference that cannot be fetched or is no image the service takes."""


class Reference(NamedTuple):
    """A reference that was fetched and looked at.

    Attributes:
        content: The file's bytes.
        digest: Their SHA-256.
    """

    content: bytes
    digest: bytes


class References:
    """Fetches references once each and keeps a bounded number of bytes of them.

    Args:
        own: Transport to the sandbox itself: its own URLs are asked in process, so that they
            work without a socket and do not wait behind the requests of clients.
        timeout: Seconds for one whole fetch.
    """

    def __init__(self, own: httpx.AsyncBaseTransport, timeout: float) -> None:
        self._timeout = timeout
        self._own = httpx.AsyncClient(transport=own)
        self._others = outbound_client(_CONNECTIONS)
        self._cache = SharedCache[Reference](_CACHED_BYTES, lambda held: len(held.content))

    async def get(self, url: str, base_url: str) -> Reference:
        """The image behind the URL; `base_url` is where the sandbox itself was reached.

        Raises:
            BadReferenceError: When it cannot be fetched, is over 10 MB or is no whole JPG, PNG or
                WebP.
        """
        client = self._own if url.startswith(base_url + "/") else self._others
        return await self._cache.get(url, lambda: self._fetch(client, url))

    async def check(self, urls: Sequence[str], base_url: str) -> str | None:
        """What is wrong with one of the references, or None."""
        try:
            for url in urls:
                await self.get(url, base_url)
        except BadReferenceError as error:
            return str(error)
        return None

    def held(self, urls: Sequence[str]) -> bool:
        """Whether all the references are known to be good without fetching."""
        return all(self._cache.peek(url) for url in urls)

    def forget(self) -> None:
        """Fetch everything anew from now on."""
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
    """Decodes a reference: upright, RGB, transparent parts on white.

    Args:
        content: The file's bytes.
        long_edge: Pixels that are enough; a larger JPG is decoded to no less than these.

    Raises:
        BadReferenceError: When it is no whole JPG, PNG or WebP, or far too large to unpack.
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
    # Whatever Pillow trips over in a stranger's bytes, they are no image.
    except Exception as error:
        raise BadReferenceError("is no JPG, PNG or WebP image") from error
    if not small_enough:
        raise BadReferenceError("has too many pixels")
    return picture
