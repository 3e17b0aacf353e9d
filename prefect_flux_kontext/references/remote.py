"""Open manifests and style files; those on the web are fetched as guarded as results are."""

from __future__ import annotations

import asyncio
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import fsspec
import fsspec.asyn
import httpx

from prefect_flux_kontext.client.transport import stream_response
from prefect_flux_kontext.images.download import follow_redirects, open_download_client
from prefect_flux_kontext.references.location import LocationKind, classify_location
from prefect_flux_kontext.settings import FluxKontextSettings

_MAX_BYTES = 2**30
_TIMEOUT_SECONDS = 600.0
_ERRORS: dict[int, type[OSError]] = {
    401: PermissionError,
    403: PermissionError,
    404: FileNotFoundError,
    410: FileNotFoundError,
}


@contextmanager
def open_source(url: str) -> Iterator[tuple[Any, str]]:
    """Open a file for reading bytes, and give its content type if it is on the web.

    A file on the web is fetched whole, from public addresses, and from a private network only if
    the configured service is on it: others may choose the URL, but not reach what this machine
    reaches.

    Raises:
        RefusedUrlError: The URL leads to an address that is not allowed.
        Exception: What the filesystem raises.
    """
    if classify_location(url) is not LocationKind.WEB:
        with fsspec.open(url, "rb") as file:
            yield file, ""
        return
    with tempfile.TemporaryFile(prefix="flux-kontext-") as file:
        # This thread may run an event loop, so the request runs on fsspec's.
        content_type = fsspec.asyn.sync(fsspec.asyn.get_loop(), _fetch, url, file)
        file.seek(0)
        yield file, content_type


async def _fetch(url: str, file: IO[bytes]) -> str:
    """Copy a file on the web, unpacked if it was packed in transit; return its content type."""
    async with (
        asyncio.timeout(_TIMEOUT_SECONDS),
        open_download_client(base_url=FluxKontextSettings().base_url) as http,
        follow_redirects(http, url, {}) as response,
    ):
        if response.status_code != httpx.codes.OK:
            raise _ERRORS.get(response.status_code, OSError)(f"HTTP {response.status_code}")
        is_packed = response.headers.get("Content-Encoding", "").lower() in ("gzip", "deflate")
        unpacker = zlib.decompressobj(zlib.MAX_WBITS | 32) if is_packed else None
        async for chunk in stream_response(response):
            file.write(unpacker.decompress(chunk) if unpacker else chunk)
            if file.tell() > _MAX_BYTES:
                raise OSError(f"it is larger than {_MAX_BYTES:,} bytes")
        content_type: str = response.headers.get("Content-Type", "")
        return content_type.partition(";")[0].strip().lower()
