"""Small pictures of large ones."""

from __future__ import annotations

import asyncio
import hashlib
import io
import logging
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from PIL import Image, ImageOps

from prefect_flux_kontext.images.decode import MAX_PIXELS
from prefect_flux_kontext.references.identity import url_identity

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from prefect_flux_kontext.client.transport import Connections

AFTER, BEFORE = 320, 640
"""Pixels of the long edge: many of what was made are seen at once, what it was made of alone."""

_QUALITY = 72


def make_thumbnail(data: bytes, edge: int) -> bytes:
    """A small WebP of an image's bytes; see `small_picture`.

    Args:
        data: A JPEG, PNG or WebP.
        edge: Pixels that neither side of it passes.

    Raises:
        Exception: It is no such image; decoders raise whatever they stumble on.
    """
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError("it has too many pixels")
        # A JPEG decodes several times faster at the size it is wanted in.
        image.draft("RGB", (edge, edge))
        return shrink_picture(image, edge)


def shrink_picture(image: Image.Image, edge: int) -> bytes:
    """A small WebP of a picture, upright, without what else its file holds.

    Args:
        image: Decoded or not.
        edge: Pixels that neither side of it passes.

    Raises:
        Exception: Decoders raise whatever they stumble on.
    """
    small = ImageOps.exif_transpose(image)
    small.thumbnail((edge, edge))
    file = io.BytesIO()
    has_alpha = small.mode in ("RGBA", "LA", "PA") or "transparency" in small.info
    small.convert("RGBA" if has_alpha else "RGB").save(file, "WEBP", quality=_QUALITY, method=2)
    return file.getvalue()


T = TypeVar("T")

logger = logging.getLogger(__name__)

# References are not waited for: their threads are apart from those that store images.
_THREADS = ThreadPoolExecutor(2, thread_name_prefix="flux-kontext-pictures")
_LARGEST_REFERENCE = 10 * 2**20
_LONGEST_FETCH = 30.0
_FETCHES = 4
_MOST_WAITING = 200


def name_of_image(key: str) -> str:
    """What the picture of a row's image is known by."""
    return key[:16]


def name_of_reference(url: str) -> str:
    """What the picture of a reference is known by, however its URL is signed."""
    return "r" + hashlib.sha256(url_identity(url).encode(errors="replace")).hexdigest()[:16]


class ThumbnailCollector:
    """Makes small pictures and holds them until they are taken.

    Whatever goes wrong costs a picture and no more.

    Args:
        http: For references.
        most: Pictures of images that are made at most.
        references: Whether references are fetched.
    """

    def __init__(self, http: Connections, most: int, *, references: bool) -> None:
        self._http = http
        self._left = most
        self._references = references
        self._made: deque[tuple[str, bytes]] = deque()  # several threads add to it
        self._wanted: set[str] = set()
        self._fetching: set[asyncio.Task[None]] = set()
        self._room = asyncio.Semaphore(_FETCHES)

    def showing(self, key: str) -> Callable[[Image.Image], None] | None:
        """What makes the picture of a row's image, in the thread that has decoded it."""
        if self._left <= 0:
            return None
        self._left -= 1
        return partial(self._make, name_of_image(key), partial(shrink_picture, edge=AFTER))

    def want_references(self, urls: Sequence[str]) -> None:
        """Fetch a row's first reference while the row waits, if there is time for it."""
        if not (urls and self._references and self._left > 0):
            return
        name = name_of_reference(urls[0])
        if name in self._wanted or len(self._fetching) >= _MOST_WAITING:
            return
        self._wanted.add(name)
        task = asyncio.create_task(self._fetch(name, urls[0]))
        self._fetching.add(task)
        task.add_done_callback(self._fetching.discard)

    def take(self) -> dict[str, bytes]:
        """The pictures made since this was last called, by name."""
        made = {}
        while self._made:
            name, data = self._made.popleft()
            made[name] = data
        return made

    async def wait(self, seconds: float) -> None:
        """Wait a little for references that are being fetched."""
        if self._fetching:
            await asyncio.wait(self._fetching, timeout=seconds)

    def close(self) -> None:
        """Fetch nothing more."""
        for task in list(self._fetching):
            task.cancel()

    def _make(self, name: str, make: Callable[[T], bytes], of: T) -> None:
        try:
            self._made.append((name, make(of)))
        except Exception as error:  # noqa: BLE001 - decoders raise whatever they stumble on
            logger.debug("No picture of %s for the gallery: %s", name, error)

    async def _fetch(self, name: str, url: str) -> None:
        data = bytearray()
        try:
            async with (
                self._room,
                asyncio.timeout(_LONGEST_FETCH),
                # A redirect may lead to where no reference may be.
                self._http.stream("GET", url) as response,
            ):
                response.raise_for_status()
                async for chunk in response.aiter_raw():
                    data += chunk
                    if len(data) > _LARGEST_REFERENCE:
                        return
        except Exception as error:  # noqa: BLE001 - a strange URL upsets more than httpx
            # Not its message: it holds the URL, which may be signed.
            logger.debug("No picture of a reference for the gallery: %s", type(error).__name__)
            return
        make = partial(make_thumbnail, edge=BEFORE)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(_THREADS, self._make, name, make, bytes(data))
