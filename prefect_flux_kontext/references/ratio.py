"""The aspect ratio `match`: of the service's six, the one nearest to the reference's own."""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

from prefect_flux_kontext.client.transport import Connections, stream_response
from prefect_flux_kontext.images.download import follow_redirects, open_download_client
from prefect_flux_kontext.images.headers import read_displayed_size
from prefect_flux_kontext.references.location import non_public_references, open_filesystem

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from prefect_flux_kontext.models import AspectRatio, GenerationRequest

_RATIOS: dict[AspectRatio, float] = {
    "21:9": 21 / 9,
    "16:9": 16 / 9,
    "4:3": 4 / 3,
    "1:1": 1.0,
    "3:4": 3 / 4,
    "9:16": 9 / 16,
}

# Nearly every header fits into the first; the second has room for long colour profiles.
_READ_BYTES = (65_536, 1_048_576)
_READ_TIMEOUT_SECONDS = 10.0

# A host that fails as often in a row is not asked again.
_MAX_FAILURES = 3

# Reads at a time from a host: few until one has succeeded, so that few are in vain.
_FIRST_READS = _MAX_FAILURES
_PARALLEL_READS = 16

# Reads at a time in all. They share connections with the downloads of results.
_ALL_PARALLEL_READS = 32

# The styles of an image are neighbours in a manifest, so few results are asked for again.
_MAX_KNOWN = 10_000


class Match(NamedTuple):
    """The ratio to send, and why it does not follow from the reference; None if it does."""

    ratio: AspectRatio = "16:9"
    note: str | None = None


def find_nearest_ratio(width: int, height: int) -> AspectRatio:
    """Return the ratio that crops or pads an image of this size least."""
    own = math.log(width / height)
    return min(_RATIOS, key=lambda ratio: abs(math.log(_RATIOS[ratio]) - own))


class RatioMatcher:
    """Chooses the ratio of requests with `match`, for the life of a run.

    Only the header of a reference is read, at most 1 MB. A reference whose header cannot be read
    gets 16:9 and a note; it is never an error. Local files and objects in buckets are read by
    their filesystem, references on the web only through `http`.
    """

    def __init__(self, http: Connections | None) -> None:
        self._http = http
        self._known: dict[str, Match] = {}
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._hosts: defaultdict[str, _Host] = defaultdict(_Host)
        self._reads = asyncio.Semaphore(_ALL_PARALLEL_READS)

    async def match(self, request: GenerationRequest) -> GenerationRequest:
        """Return the request with its `matched_ratio`, if its ratio is `match`."""
        if request.aspect_ratio != "match" or request.matched_ratio is not None:
            return request
        reference = request.image_urls[0]
        async with self._locks.setdefault(reference, asyncio.Lock()):
            if reference not in self._known:
                found = await self._find(reference)
                if len(self._known) >= _MAX_KNOWN:
                    del self._known[next(iter(self._known))]
                self._known[reference] = found
            found = self._known[reference]
        return request.model_copy(update={"matched_ratio": found.ratio, "match_note": found.note})

    async def _find(self, reference: str) -> Match:
        if non_public_references([reference]):
            try:
                return _to_match(await asyncio.to_thread(_read_own_size, reference))
            except Exception as error:  # noqa: BLE001 - each filesystem has errors of its own
                return _unknown(type(error).__name__)
        if self._http is None:
            return _unknown("FLUX_KONTEXT_MATCH_REFERENCES is off")
        host = self._hosts[urlsplit(reference).netloc]
        async with host.slots, self._reads:
            if host.failures >= _MAX_FAILURES:
                return _unknown(f"its host failed {_MAX_FAILURES} times in a row")
            try:
                async with asyncio.timeout(_READ_TIMEOUT_SECONDS):
                    match = _to_match(await _read_web_size(self._http, reference))
            except Exception as error:  # noqa: BLE001 - invalid URLs raise more than httpx errors
                # Without the message, which may hold the URL and its signature.
                match = _unknown(type(error).__name__)
            host.record(is_success=match.note is None)
            return match


@asynccontextmanager
async def open_ratio_matcher(base_url: str, *, reads_web: bool) -> AsyncIterator[RatioMatcher]:
    """Open a matcher with connections of its own."""
    async with open_download_client(base_url=base_url) as http:
        yield RatioMatcher(http if reads_web else None)


class _Host:
    """What is known about a host of references."""

    def __init__(self) -> None:
        self.slots = asyncio.Semaphore(_FIRST_READS)
        self.failures = 0
        self._is_proven = False

    def record(self, *, is_success: bool) -> None:
        self.failures = 0 if is_success else self.failures + 1
        if is_success and not self._is_proven:
            self._is_proven = True
            for _ in range(_PARALLEL_READS - _FIRST_READS):
                self.slots.release()


def _to_match(size: tuple[int, int] | str) -> Match:
    if isinstance(size, str):
        return _unknown(size)
    if not all(size):
        return _unknown("its header has no size")
    return Match(find_nearest_ratio(*size))


def _unknown(reason: str) -> Match:
    return Match(note=f"16:9 was sent, because the reference's shape is unknown: {reason}")


def _read_own_size(reference: str) -> tuple[int, int] | str:
    fs, path = open_filesystem(reference)
    for limit in _READ_BYTES:
        if size := read_displayed_size(fs.cat_file(path, start=0, end=limit)):
            return size
    return "its header has no size"


async def _read_web_size(http: Connections, url: str) -> tuple[int, int] | str:
    """Return width and height of an image on the web, or why they are unknown."""
    for limit in _READ_BYTES:
        data = bytearray()
        async with follow_redirects(http, url, {"Range": f"bytes=0-{limit - 1}"}) as response:
            if response.status_code not in (200, 206):
                return f"HTTP {response.status_code}"
            async for chunk in stream_response(response):
                data += chunk
                if len(data) >= limit:
                    break
        if size := read_displayed_size(bytes(data)):
            return size
        if len(data) < limit:
            break
    return "it is not a JPG, PNG or WebP"
