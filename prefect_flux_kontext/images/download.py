"""One image, fetched until it is whole: resumed where that is safe, else begun anew."""

from __future__ import annotations

import asyncio
import re
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import httpx

from prefect_flux_kontext.client.retry import jittered_backoff, parse_retry_after
from prefect_flux_kontext.client.transport import Connections, stream_response
from prefect_flux_kontext.errors import DownloadError, InvalidImageError, RefusedUrlError
from prefect_flux_kontext.images.ssrf import Guard, GuardedTransport

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

T = TypeVar("T")

_ATTEMPTS = 6
_LARGEST_IMAGE = 50 * 2**20
_LONGEST_STALL = 30.0
_LONGEST_ATTEMPT = 300.0
_MOST_REDIRECTS = 3

_TIMEOUTS = httpx.Timeout(connect=10, read=_LONGEST_STALL, write=30, pool=None)
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


def open_download_client(
    transport: httpx.AsyncBaseTransport | None = None, *, base_url: str | None = None
) -> Connections:
    """Connections for results, apart from the API's: no key in them, and no submit behind them.

    Args:
        transport: Another way to reach the results than the network, for tests.
        base_url: The configured service. Results are fetched from the public internet, and from
            a private network only if the service is there itself.
    """
    return Connections(
        transport or GuardedTransport(Guard(base_url)),
        timeout=_TIMEOUTS,
        headers={"Accept": "*/*", "Accept-Encoding": "identity"},
    )


@dataclass
class _Partial:
    """What has come so far, and the version of the file that it is a part of."""

    data: bytearray = field(default_factory=bytearray)
    etag: str | None = None

    def clear(self) -> None:
        self.data.clear()
        self.etag = None


async def download_image(
    url: str, http: Connections, finished: Callable[[bytes], T], *, task_id: str
) -> T:
    """Fetch a result until it is a whole image, six times at most.

    At most 50 MB are taken. An attempt ends after 30 s without a byte, and after 300 s in all.
    The next goes on where it ended, if the server has given the file a strong ETag and it is
    still the same file; else it begins anew.

    Args:
        url: Where it is.
        http: Connections made by `download_client`.
        finished: Makes of the bytes, in a thread, what is to be stored; raises
            InvalidImageError where they are no whole image.
        task_id: The paid task, for messages.

    Returns:
        What `finished` has made.

    Raises:
        DownloadError: The URL could not be fetched.
        RefusedUrlError: It leads where no download may go; it was not asked.
        InvalidImageError: It serves no whole image.
    """
    partial = _Partial()
    attempt = 0
    while True:
        attempt += 1
        failure: DownloadError | InvalidImageError
        try:
            await _fetch(http, url, partial, last=attempt == _ATTEMPTS)
            data = bytes(partial.data)
            partial.clear()
            return await asyncio.to_thread(finished, data)
        except (DownloadError, InvalidImageError) as error:
            failure = error
        if attempt == _ATTEMPTS or not failure.retryable:
            break
        await asyncio.sleep(jittered_backoff(attempt))
    tried = "1 attempt" if attempt == 1 else f"{attempt} attempts"
    raise type(failure)(
        f"Task {task_id} is paid for, but its result {_without_secrets(url)} cannot be stored "
        f"after {tried}: {failure.message}",
        task_id=task_id,
        code=failure.code,
    )


async def _fetch(http: Connections, url: str, partial: _Partial, *, last: bool) -> None:
    """Bring what is missing; what has come stays in `partial` where it can be gone on from."""
    if partial.etag is None:
        partial.clear()
    wait = None
    try:
        async with (
            asyncio.timeout(_LONGEST_ATTEMPT),
            asyncio.timeout(_LONGEST_STALL) as stall,
            _redirected(http, url, _range(partial)) as response,
        ):
            told = _refusal(response, partial)
            if told is None:
                async for chunk in stream_response(response):
                    stall.reschedule(asyncio.get_running_loop().time() + _LONGEST_STALL)
                    partial.data += chunk
                    if len(partial.data) > _LARGEST_IMAGE:
                        told = f"it is larger than {_LARGEST_IMAGE:,} bytes"
                        partial.clear()
                        break
                else:
                    return
            else:
                wait = parse_retry_after(response.headers.get("Retry-After"))
    except RefusedUrlError:
        raise
    except Exception as error:  # noqa: BLE001 - a strange URL upsets more than httpx
        told = f"{type(error).__name__} after {len(partial.data):,} bytes"
    if wait and not last:
        await asyncio.sleep(wait)
    raise DownloadError(f"The download failed: {told}.")


@asynccontextmanager
async def _redirected(
    http: Connections, url: str, headers: dict[str, str]
) -> AsyncIterator[httpx.Response]:
    """Follow redirects, each as guarded as the first URL."""
    for _ in range(1 + _MOST_REDIRECTS):
        async with http.stream("GET", url, headers=headers) as response:
            if not response.has_redirect_location:
                yield response
                return
            url = str(httpx.URL(url).join(response.headers["Location"]))
    raise httpx.TooManyRedirects(f"more than {_MOST_REDIRECTS} redirects")


def _range(partial: _Partial) -> dict[str, str]:
    if not partial.data or partial.etag is None:
        return {}
    return {"Range": f"bytes={len(partial.data)}-", "If-Range": partial.etag}


def _refusal(response: httpx.Response, partial: _Partial) -> str | None:
    """Why the response is of no use, or None with `partial` ready for its body."""
    if response.status_code == httpx.codes.OK:
        partial.clear()
        etag = response.headers.get("ETag", "")
        # A weak one may name two files that are not the same to the byte.
        partial.etag = etag if etag.startswith('"') else None
        return None
    if response.status_code == httpx.codes.PARTIAL_CONTENT and partial.data:
        rest = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if (
            rest
            and int(rest[1]) == len(partial.data)
            and response.headers.get("ETag", partial.etag) == partial.etag
        ):
            return None
    if response.status_code in (
        httpx.codes.PARTIAL_CONTENT,
        httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE,
    ):
        partial.clear()
    return f"HTTP {response.status_code}"


def _without_secrets(url: str) -> str:
    """The URL without what may sign it: its query, its fragment, a password."""
    return re.sub(r"//[^/?#]*@", "//", re.split(r"[?#]", url)[0])[:200]
