"""From a result's URLs to checked images in their place."""

from __future__ import annotations

import asyncio
import hashlib
import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import httpx

from prefect_flux_kontext.api.backoff import jittered, retry_after_seconds
from prefect_flux_kontext.api.connections import POOL_LIMITS, Connections, tls_context
from prefect_flux_kontext.errors import (
    DownloadError,
    InvalidImageError,
    RefusedUrlError,
    StorageError,
)
from prefect_flux_kontext.guarded import Guard, GuardedTransport
from prefect_flux_kontext.images import EXTENSIONS, ImageInfo, inspect_image
from prefect_flux_kontext.models import StoredImage
from prefect_flux_kontext.storage import safe_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prefect_flux_kontext.models import GenerationResult
    from prefect_flux_kontext.storage import OutputFolder

_ATTEMPTS = 6
_LARGEST_IMAGE = 50 * 2**20
_LONGEST_DOWNLOAD = 300.0

_TIMEOUTS = httpx.Timeout(connect=10, read=30, write=30, pool=None)


def download_client(
    transport: httpx.AsyncBaseTransport | None = None, *, base_url: str | None = None
) -> Connections:
    """Connections for results, apart from the API's: no key in them, and no submit behind them.

    Args:
        transport: Another way to reach the results than the network, for tests.
        base_url: The configured service. Results are fetched from the public internet, and from
            a private network only if the service is there itself.
    """
    guard = Guard(base_url)
    return Connections(
        lambda: httpx.AsyncClient(
            transport=transport or GuardedTransport(guard, limits=POOL_LIMITS, tls=tls_context()),
            headers={"Accept-Encoding": "identity"},
            follow_redirects=True,
            max_redirects=3,
        ),
        timeout=_TIMEOUTS,
    )


def image_names(name: str, number: int, extension: str, key: str | None) -> list[str]:
    """The file names a result's image may have, the wanted one first.

    `cat.jpg`, and where that is another row's image already, `cat~1a2b3c4d.jpg` after the row
    key. A second image of the same result is `cat~2.jpg`, and so on. No row id is spelled with a
    tilde, so no name is that of another row.
    """
    stem = safe_name(name)
    which = "" if number == 1 else f"~{number}"
    apart = [] if key is None else [f"{stem}~{key[:8]}{which}{extension}"]
    return [f"{stem}{which}{extension}", *apart]


async def persist_result(
    result: GenerationResult,
    output: OutputFolder,
    http: Connections,
    *,
    name: str,
    key: str | None = None,
) -> list[StoredImage]:
    """Download every image of a result, check it and put it in its place.

    Args:
        result: What came of the task.
        output: Where the images go.
        http: Connections made by `download_client`.
        name: File name without extension; a second image gets `~2` after it, and so on.
        key: The row key, for which no other row's image is written over; None writes over
            what has that name.

    Returns:
        One record for each image, in the order of the result's URLs.

    Raises:
        DownloadError: A URL could not be fetched, after several attempts.
        RefusedUrlError: A URL leads where no download may go; it was not asked.
        InvalidImageError: What it serves is not a whole image of the kind asked for.
        StorageError: The output refused the file.
    """
    stored = []
    for number, url in enumerate(result.result_urls, start=1):
        data, image = await _download(result, url, http)
        names = image_names(name, number, f".{EXTENSIONS[image.format]}", key)
        stored.append(
            StoredImage(
                uri=await output.write_apart(names, data),
                task_id=result.task_id,
                format=image.format,
                size=len(data),
                sha256=await asyncio.to_thread(_sha256, data),
                width=image.width,
                height=image.height,
            )
        )
    return stored


async def name_stored(
    files: Sequence[str], output: OutputFolder, *, name: str, key: str
) -> list[str]:
    """Give a row the images that are stored for its key already, and return their URIs.

    Raises:
        StorageError: One of them is gone, or the filesystem refused.
    """
    uris = []
    for number, file in enumerate(files, start=1):
        names = image_names(name, number, PurePosixPath(file).suffix, key)
        if file in names:
            uris.append(output.uri(file))
            continue
        image = await output.read(file)
        if image is None:
            raise StorageError(f"{output.uri(file)} was stored for this row and is gone.")
        uris.append(await output.write_apart(names, image))
    return uris


async def _download(
    result: GenerationResult, url: str, http: Connections
) -> tuple[bytes, ImageInfo]:
    expected = result.request.output_format if result.request else None
    attempt = 0
    while True:
        attempt += 1
        failure: DownloadError | InvalidImageError
        try:
            data = await _fetch(http, url, last=attempt == _ATTEMPTS)
            return data, await asyncio.to_thread(inspect_image, data, expected=expected)
        except (DownloadError, InvalidImageError) as error:
            failure = error
        if attempt == _ATTEMPTS or not failure.retryable:
            break
        await asyncio.sleep(jittered(attempt))
    tried = "1 attempt" if attempt == 1 else f"{attempt} attempts"
    raise type(failure)(
        f"Task {result.task_id} is paid for, but its result {_without_secrets(url)} cannot be "
        f"stored after {tried}: {failure.message}",
        task_id=result.task_id,
        code=failure.code,
    )


async def _fetch(http: Connections, url: str, *, last: bool) -> bytes:
    data = bytearray()
    wait = None
    try:
        async with asyncio.timeout(_LONGEST_DOWNLOAD), http.stream("GET", url) as response:
            if response.status_code == httpx.codes.OK:
                async for chunk in response.aiter_raw():
                    data += chunk
                    if len(data) > _LARGEST_IMAGE:
                        break
                else:
                    return bytes(data)
                told = f"it is larger than {_LARGEST_IMAGE:,} bytes"
            else:
                told = f"HTTP {response.status_code}"
                wait = retry_after_seconds(response.headers.get("Retry-After"))
    except RefusedUrlError:
        raise
    except Exception as error:  # noqa: BLE001 - a strange URL upsets more than httpx
        told = f"{type(error).__name__} after {len(data):,} bytes"
    if wait and not last:
        await asyncio.sleep(wait)
    raise DownloadError(f"The download failed: {told}.")


def _without_secrets(url: str) -> str:
    """The URL without what may sign it: its query, its fragment, a password."""
    return re.sub(r"//[^/?#]*@", "//", re.split(r"[?#]", url)[0])[:200]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
