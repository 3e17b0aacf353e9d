"""Thumbnails of result images and of reference images."""

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

from prefect_flux_kontext.images.checks import Fingerprint, take_fingerprint
from prefect_flux_kontext.images.decode import MAX_PIXELS
from prefect_flux_kontext.images.headers import extract_image, find_slow_structure
from prefect_flux_kontext.redaction import redact_url
from prefect_flux_kontext.references.identity import read_content, url_identity
from prefect_flux_kontext.references.location import non_public_references

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from prefect_flux_kontext.client.transport import Connections

T = TypeVar("T")

logger = logging.getLogger(__name__)

RESULT_EDGE_PIXELS, REFERENCE_EDGE_PIXELS = 320, 640
"""Pixels of the long edge of a result's and of a reference's thumbnail.

The grid shows many results at a time; a reference is only shown alone, so its thumbnail is larger.
"""

# At this quality, 48 thumbnails of results take about 0.7 MB as base64.
_WEBP_QUALITY = 72

# References have threads of their own, so that they never delay the storing of images.
_THREADS = ThreadPoolExecutor(2, thread_name_prefix="flux-kontext-thumbnails")

# The service takes references of at most 10 MB.
_MAX_REFERENCE_BYTES = 10 * 2**20

_FETCH_TIMEOUT_SECONDS = 30.0

# Bounds the connections to the hosts of references.
_PARALLEL_FETCHES = 4

# Bounds the memory of waiting fetches: beyond it, references go without a thumbnail.
_MAX_PENDING_FETCHES = 200


def make_thumbnail(data: bytes, edge: int) -> bytes:
    """Decode an image and make a thumbnail of it; see `shrink_image`.

    Args:
        data: The bytes of a JPEG, PNG or WebP.
        edge: The most pixels of either side.

    Raises:
        Exception: The image is invalid or has more than 64 million pixels. Decoders raise many
            types of errors.
    """
    if slow := find_slow_structure(data):
        raise ValueError(slow)
    with Image.open(
        io.BytesIO(extract_image(data) or data), formats=("JPEG", "PNG", "WEBP")
    ) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError("the image has too many pixels")
        # A JPEG decodes several times faster at a reduced size.
        image.draft("RGB", (edge, edge))
        return shrink_image(image, edge)


def shrink_image(image: Image.Image, edge: int) -> bytes:
    """Make a small upright WebP of an image, without the metadata of its file.

    Args:
        image: The image, decoded or not.
        edge: The most pixels of either side.

    Raises:
        Exception: The image is invalid. Decoders raise many types of errors.
    """
    small = ImageOps.exif_transpose(image)
    # Averages whole pixels before it resizes, which takes a third of the time.
    small.thumbnail((edge, edge), reducing_gap=1.0)
    file = io.BytesIO()
    has_alpha = small.mode in ("RGBA", "LA", "PA") or "transparency" in small.info
    small.convert("RGBA" if has_alpha else "RGB").save(
        file, "WEBP", quality=_WEBP_QUALITY, method=2
    )
    return file.getvalue()


def image_thumbnail_name(key: str) -> str:
    """Return the thumbnail name of a row's image, given the row key."""
    return key[:16]


def reference_thumbnail_name(url: str) -> str:
    """Return the thumbnail name of a reference; the signature of its URL does not change it."""
    return (
        "r"
        + hashlib.sha256(url_identity(redact_url(url)).encode(errors="replace")).hexdigest()[:16]
    )


class ThumbnailCollector:
    """Makes thumbnails and holds them until they are taken.

    Errors are logged at debug level; they cost a thumbnail and nothing else.

    Args:
        http: Connections to fetch references.
        most: The most thumbnails of result images to make.
        references: Whether to fetch references.
    """

    def __init__(self, http: Connections, most: int, *, references: bool) -> None:
        self._http = http
        self._left = most
        self._fetches_references = references
        self._fingerprints: dict[str, Fingerprint] = {}
        self._made: deque[tuple[str, bytes]] = deque()  # several threads append to it
        self._requested: set[str] = set()
        self._fetching: set[asyncio.Task[None]] = set()
        self._semaphore = asyncio.Semaphore(_PARALLEL_FETCHES)

    def create_thumbnail_callback(self, key: str) -> Callable[[Image.Image], None] | None:
        """Return a function that makes the thumbnail of a row's decoded image; None at the limit.

        The thread that has decoded the image calls the function.
        """
        if self._left <= 0:
            return None
        self._left -= 1
        return partial(
            self._make, image_thumbnail_name(key), partial(shrink_image, edge=RESULT_EDGE_PIXELS)
        )

    def find_fingerprint(self, urls: Sequence[str]) -> Fingerprint | None:
        """Return the fingerprint of a row's first reference, if it has been fetched."""
        return self._fingerprints.get(reference_thumbnail_name(urls[0])) if urls else None

    def request_reference(self, urls: Sequence[str]) -> None:
        """Start to fetch a row's first reference while the row waits, within the limits."""
        if not (urls and self._fetches_references and self._left > 0):
            return
        name = reference_thumbnail_name(urls[0])
        if name in self._requested or len(self._fetching) >= _MAX_PENDING_FETCHES:
            return
        self._requested.add(name)
        task = asyncio.create_task(self._fetch(name, urls[0]))
        self._fetching.add(task)
        task.add_done_callback(self._fetching.discard)

    def take(self) -> dict[str, bytes]:
        """Return the thumbnails made since the last call, by name."""
        made = {}
        while self._made:
            name, data = self._made.popleft()
            made[name] = data
        return made

    async def wait(self, seconds: float) -> None:
        """Wait at most this long for pending fetches of references."""
        if self._fetching:
            await asyncio.wait(self._fetching, timeout=seconds)

    def close(self) -> None:
        """Cancel pending fetches."""
        for task in list(self._fetching):
            task.cancel()

    def _make(self, name: str, make: Callable[[T], bytes], source: T) -> None:
        try:
            self._made.append((name, make(source)))
        except Exception as error:  # noqa: BLE001 - decoders raise many types of errors
            logger.debug("No thumbnail of %s for the gallery: %s", name, error)

    async def _fetch(self, name: str, url: str) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with self._semaphore, asyncio.timeout(_FETCH_TIMEOUT_SECONDS):
                if non_public_references([url]):
                    read = partial(read_content, url, fit=False)
                    data: bytes | bytearray = await loop.run_in_executor(_THREADS, read)
                else:
                    data = await download_reference(self._http, url)
        except Exception as error:  # noqa: BLE001 - invalid URLs raise more than httpx errors
            # The message is left out: it holds the URL, which may be signed.
            logger.debug("No thumbnail of a reference for the gallery: %s", type(error).__name__)
            return
        make = partial(self._make_reference, name)
        await loop.run_in_executor(_THREADS, self._make, name, make, bytes(data))

    def _make_reference(self, name: str, data: bytes) -> bytes:
        thumbnail = make_thumbnail(data, REFERENCE_EDGE_PIXELS)
        with Image.open(io.BytesIO(thumbnail), formats=("WEBP",)) as image:
            self._fingerprints[name] = take_fingerprint(image)
        return thumbnail


async def download_reference(http: Connections, url: str) -> bytearray:
    """Download a reference on the web, of at most 10 MB.

    Raises:
        Exception: It cannot be downloaded; invalid URLs raise more than httpx errors.
    """
    data = bytearray()
    # Redirects are not followed: they could lead to a private address.
    async with http.stream("GET", url) as response:
        response.raise_for_status()
        async for chunk in response.aiter_raw():
            data += chunk
            if len(data) > _MAX_REFERENCE_BYTES:
                raise ValueError("the reference is too large")
    return data
