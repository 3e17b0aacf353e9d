"""Download a result image: retried until it is whole, resumed where that is safe."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import httpx

from prefect_flux_kontext.client.retry import jittered_backoff, parse_retry_after
from prefect_flux_kontext.client.transport import Connections, stream_response
from prefect_flux_kontext.errors import DownloadError, InvalidImageError, RefusedUrlError
from prefect_flux_kontext.images.ssrf import AddressGuard, GuardedTransport
from prefect_flux_kontext.redaction import redact_url
from prefect_flux_kontext.telemetry import trace

T = TypeVar("T")

# Six attempts with backoff take some seconds, enough for a host to recover from a short failure.
_MAX_ATTEMPTS = 6

# Bounds the memory of a download.
_MAX_IMAGE_BYTES = 50 * 2**20

# An attempt ends after this long without a byte, and after this long in all.
_STALL_TIMEOUT_SECONDS = 30.0
_ATTEMPT_TIMEOUT_SECONDS = 300.0

# No attempt begins after this long: a host that sends few bytes at a time would hold one of the
# places for images for half an hour. The row stays outstanding and is collected later.
_TOTAL_TIMEOUT_SECONDS = 600.0

_MAX_REDIRECTS = 3

_TIMEOUTS = httpx.Timeout(connect=10, read=_STALL_TIMEOUT_SECONDS, write=30, pool=None)
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


def open_download_client(
    transport: httpx.AsyncBaseTransport | None = None, *, base_url: str | None = None
) -> Connections:
    """Open connections for downloads, which never send the API key and never delay submits.

    They lead to public addresses, and to a private network only if the service is on it.
    """
    return Connections(
        transport or GuardedTransport(AddressGuard(base_url)),
        timeout=_TIMEOUTS,
        headers={"Accept": "*/*", "Accept-Encoding": "identity"},
    )


@dataclass
class _Partial:
    """The bytes received so far, and the ETag of the file that they belong to."""

    data: bytearray = field(default_factory=bytearray)
    etag: str | None = None

    @property
    def range_headers(self) -> dict[str, str]:
        """The headers that ask for the missing bytes only, if the download can resume."""
        if not self.data or self.etag is None:
            return {}
        return {"Range": f"bytes={len(self.data)}-", "If-Range": self.etag}

    def clear(self) -> None:
        self.data.clear()
        self.etag = None


@trace("download")
async def download_image(
    url: str, http: Connections, process: Callable[[bytes], T], *, task_id: str
) -> T:
    """Download a result until it is a whole image, in at most six attempts, and process it.

    The image may have at most 50 MB. An attempt ends after 30 s without a byte, and after 300 s in
    all; none begins after 600 s. The next attempt resumes the download if the server gave the file
    a strong ETag and it is still the same file; otherwise it starts again. `process` gets the
    bytes in a thread, and raises InvalidImageError if they are not a whole image.

    Raises:
        DownloadError: The URL could not be downloaded.
        RefusedUrlError: The URL is not allowed; no request was sent.
        InvalidImageError: The URL does not serve a whole image.
    """
    partial = _Partial()
    attempt = 0
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _TOTAL_TIMEOUT_SECONDS
    while True:
        attempt += 1
        failure: DownloadError | InvalidImageError
        try:
            await _fetch(http, url, partial, is_last=attempt == _MAX_ATTEMPTS)
            data = bytes(partial.data)
            partial.clear()
            return await asyncio.to_thread(process, data)
        except (DownloadError, InvalidImageError) as error:
            failure = error
        if attempt == _MAX_ATTEMPTS or not failure.retryable or loop.time() > deadline:
            break
        await asyncio.sleep(jittered_backoff(attempt))
    tried = "1 attempt" if attempt == 1 else f"{attempt} attempts"
    raise type(failure)(
        f"Task {task_id} is paid for, but its result {_show_address(url)} cannot be stored "
        f"after {tried}: {failure.message}",
        task_id=task_id,
        code=failure.code,
    )


async def _fetch(http: Connections, url: str, partial: _Partial, *, is_last: bool) -> None:
    """Download the missing bytes into `partial`, which keeps them if the download can resume."""
    if partial.etag is None:
        partial.clear()
    wait = None
    try:
        async with (
            asyncio.timeout(_ATTEMPT_TIMEOUT_SECONDS),
            asyncio.timeout(_STALL_TIMEOUT_SECONDS) as stall,
            follow_redirects(http, url, partial.range_headers) as response,
        ):
            problem = _find_problem(response, partial)
            if problem is None:
                async for chunk in stream_response(response):
                    stall.reschedule(asyncio.get_running_loop().time() + _STALL_TIMEOUT_SECONDS)
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
    except Exception as error:  # noqa: BLE001 - invalid URLs raise more than httpx errors
        problem = f"{type(error).__name__} after {len(partial.data):,} bytes"
    if wait and not is_last:
        await asyncio.sleep(wait)
    raise DownloadError(f"The download failed: {problem}.")


@asynccontextmanager
async def follow_redirects(
    http: Connections, url: str, headers: dict[str, str]
) -> AsyncIterator[httpx.Response]:
    """Send the request and follow redirects; the transport checks each URL."""
    for _ in range(1 + _MAX_REDIRECTS):
        async with http.stream("GET", url, headers=headers) as response:
            if not response.has_redirect_location:
                yield response
                return
            url = str(httpx.URL(url).join(response.headers["Location"]))
    raise httpx.TooManyRedirects(f"more than {_MAX_REDIRECTS} redirects")


def _find_problem(response: httpx.Response, partial: _Partial) -> str | None:
    """Return why the response cannot be used, or None with `partial` ready for its body."""
    if response.status_code == httpx.codes.OK:
        partial.clear()
        etag = response.headers.get("ETag", "")
        # Two files with the same weak ETag may differ in their bytes.
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


def _show_address(url: str) -> str:
    """Return the beginning of a redacted URL without its query."""
    return re.split(r"[?#]", redact_url(url))[0][:200]
