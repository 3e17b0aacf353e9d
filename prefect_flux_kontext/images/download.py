"""Download an image with retries. A retry resumes if that is safe, else it starts again."""

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

# With the backoff between them, these ride out a short outage of the host.
_ATTEMPTS = 6
# Far above the size of a result; bounds the memory that a wrong URL can take.
_MAX_IMAGE_BYTES = 50 * 2**20
# Time without a byte after which an attempt ends.
_STALL_SECONDS = 30.0
# Limit of a whole attempt, also for a host that sends one byte at a time.
_LONGEST_ATTEMPT = 300.0
_MAX_REDIRECTS = 3

_TIMEOUTS = httpx.Timeout(connect=10, read=_STALL_SECONDS, write=30, pool=None)
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


def open_download_client(
    transport: httpx.AsyncBaseTransport | None = None, *, base_url: str | None = None
) -> Connections:
    """Open the connections for results. They carry no API key, and submits do not wait for them.

    Args:
        transport: Replaces the network, for tests.
        base_url: The configured service. Results are fetched from the public internet, and from
            a private network only if the service is there too.
    """
    return Connections(
        transport or GuardedTransport(Guard(base_url)),
        timeout=_TIMEOUTS,
        headers={"Accept": "*/*", "Accept-Encoding": "identity"},
    )


@dataclass
class _PartialDownload:
    """Data received so far, and the version of the file that it belongs to."""

    data: bytearray = field(default_factory=bytearray)
    etag: str | None = None

    def clear(self) -> None:
        self.data.clear()
        self.etag = None


async def download_image(
    url: str, http: Connections, process: Callable[[bytes], T], *, task_id: str
) -> T:
    """Fetch a result until it is a complete image, in at most six attempts.

    The limit is 50 MiB. An attempt ends after 30 s without a byte, and after 300 s in total. The
    next attempt resumes where it ended, if the server sent a strong ETag and the file has not
    changed; else it starts again.

    Args:
        url: URL of the result.
        http: Connections from `open_download_client`.
        process: Converts the bytes to the return value, in a thread; raises InvalidImageError
            if they are not a complete image.
        task_id: The paid task, for messages.

    Returns:
        The return value of `process`.

    Raises:
        DownloadError: The URL could not be fetched.
        RefusedUrlError: The URL is not allowed; no request was sent.
        InvalidImageError: The URL does not serve a complete image.
    """
    partial = _PartialDownload()
    attempt = 0
    while True:
        attempt += 1
        failure: DownloadError | InvalidImageError
        try:
            await _fetch(http, url, partial, last=attempt == _ATTEMPTS)
            data = bytes(partial.data)
            partial.clear()
            return await asyncio.to_thread(process, data)
        except (DownloadError, InvalidImageError) as error:
            failure = error
        if attempt == _ATTEMPTS or not failure.retryable:
            break
        await asyncio.sleep(jittered_backoff(attempt))
    attempts = "1 attempt" if attempt == 1 else f"{attempt} attempts"
    raise type(failure)(
        f"Task {task_id} is paid for, but its result {_redact_url(url)} cannot be stored "
        f"after {attempts}: {failure.message}",
        task_id=task_id,
        code=failure.code,
    )


async def _fetch(http: Connections, url: str, partial: _PartialDownload, *, last: bool) -> None:
    """Fetch the missing bytes. Data that a later attempt can resume from stays in `partial`."""
    if partial.etag is None:
        partial.clear()
    wait = None
    try:
        async with (
            asyncio.timeout(_LONGEST_ATTEMPT),
            asyncio.timeout(_STALL_SECONDS) as stall,
            _follow_redirects(http, url, _build_range_header(partial)) as response,
        ):
            problem = _check_response(response, partial)
            if problem is None:
                async for chunk in stream_response(response):
                    stall.reschedule(asyncio.get_running_loop().time() + _STALL_SECONDS)
                    partial.data += chunk
                    if len(partial.data) > _MAX_IMAGE_BYTES:
                        problem = f"it is larger than {_MAX_IMAGE_BYTES:,} bytes"
                        partial.clear()
                        break
                else:
                    return
            else:
                wait = parse_retry_after(response.headers.get("Retry-After"))
    except RefusedUrlError:
        raise
    except Exception as error:  # noqa: BLE001 - an invalid URL raises errors of any type
        problem = f"{type(error).__name__} after {len(partial.data):,} bytes"
    if wait and not last:
        await asyncio.sleep(wait)
    raise DownloadError(f"The download failed: {problem}.")


@asynccontextmanager
async def _follow_redirects(
    http: Connections, url: str, headers: dict[str, str]
) -> AsyncIterator[httpx.Response]:
    """Open a response, following redirects; each URL passes the guard."""
    for _ in range(1 + _MAX_REDIRECTS):
        async with http.stream("GET", url, headers=headers) as response:
            if not response.has_redirect_location:
                yield response
                return
            url = str(httpx.URL(url).join(response.headers["Location"]))
    raise httpx.TooManyRedirects(f"more than {_MAX_REDIRECTS} redirects")


def _build_range_header(partial: _PartialDownload) -> dict[str, str]:
    if not partial.data or partial.etag is None:
        return {}
    return {"Range": f"bytes={len(partial.data)}-", "If-Range": partial.etag}


def _check_response(response: httpx.Response, partial: _PartialDownload) -> str | None:
    """Return why a response is unusable, or None with `partial` ready for its body."""
    if response.status_code == httpx.codes.OK:
        partial.clear()
        etag = response.headers.get("ETag", "")
        # Files with the same weak ETag may differ in their bytes.
        partial.etag = etag if etag.startswith('"') else None
        return None
    if response.status_code == httpx.codes.PARTIAL_CONTENT and partial.data:
        content_range = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if (
            content_range
            and int(content_range[1]) == len(partial.data)
            and response.headers.get("ETag", partial.etag) == partial.etag
        ):
            return None
    if response.status_code in (
        httpx.codes.PARTIAL_CONTENT,
        httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE,
    ):
        partial.clear()
    return f"HTTP {response.status_code}"


def _redact_url(url: str) -> str:
    """Strip what may grant access from a URL: query, fragment and password."""
    return re.sub(r"//[^/?#]*@", "//", re.split(r"[?#]", url)[0])[:200]
