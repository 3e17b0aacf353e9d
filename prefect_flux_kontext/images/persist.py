"""Download, check and store the images of a result."""

from __future__ import annotations

import functools
import hashlib
import logging
from posixpath import splitext
from typing import TYPE_CHECKING

from prefect_flux_kontext.errors import StorageError
from prefect_flux_kontext.images.decode import EXTENSIONS, decode_image
from prefect_flux_kontext.images.download import download_image
from prefect_flux_kontext.images.metadata import add_ai_metadata
from prefect_flux_kontext.models import StoredImage

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from PIL import Image

    from prefect_flux_kontext.client.transport import Connections
    from prefect_flux_kontext.images.decode import ImageInfo
    from prefect_flux_kontext.images.metadata import SourceType
    from prefect_flux_kontext.models import GenerationResult
    from prefect_flux_kontext.storage.filesystem import OutputFolder

logger = logging.getLogger(__name__)


def list_image_names(name: str, number: int, extension: str, key: str) -> list[str]:
    """Return the file names that a result's image may have, the preferred one first.

    The preferred name is `cat.jpg`. If another row's image has it, `cat~1a2b3c4d.jpg` is used,
    with the start of the row key. The second image of a result is `cat~2.jpg`, and so on. No row's
    name ends in a tilde and a few digits, so no two rows share a name.
    """
    suffix = "" if number == 1 else f"~{number}"
    return [f"{name}{suffix}{extension}", f"{name}~{key[:8]}{suffix}{extension}"]


async def persist_result(
    result: GenerationResult,
    output: OutputFolder,
    http: Connections,
    *,
    name: str,
    key: str | None = None,
    ai_mark: bool = True,
    find_flags: Callable[[Image.Image], list[str]] | None = None,
) -> list[StoredImage]:
    """Download every image of a result, check it and store it; return them in the URLs' order.

    An image of another format than requested is stored too, with its own extension: it is paid
    for. With `ai_mark`, images are labelled as made by AI. The row's `name` is safe and without
    extension; `list_image_names` says when the `key` is a part of it. `find_flags` checks
    the first decoded image, in a thread; it must not raise.

    Raises:
        DownloadError: A URL could not be downloaded in six attempts.
        RefusedUrlError: A URL is not allowed; no request was sent.
        InvalidImageError: A URL does not serve a whole image.
        StorageError: The file cannot be written.
    """
    key = key or hashlib.sha256(result.task_id.encode()).hexdigest()
    requested = result.request.output_format if result.request else None
    source: SourceType | None = None
    if ai_mark:
        is_composite = result.request is not None and result.request.image_urls
        source = (
            "compositeWithTrainedAlgorithmicMedia" if is_composite else "trainedAlgorithmicMedia"
        )
    stored = []
    for number, url in enumerate(result.result_urls, start=1):
        data, info, sha256, flags = await download_image(
            url,
            http,
            functools.partial(
                _process, source=source, find_flags=find_flags if number == 1 else None
            ),
            task_id=result.task_id,
        )
        if requested not in (None, info.format):
            logger.warning(
                "Task %s was asked for a %s and returned a %s, which was stored as it is.",
                result.task_id,
                str(requested).upper(),
                info.format.upper(),
            )
        names = list_image_names(name, number, f".{EXTENSIONS[info.format]}", key)
        stored.append(
            StoredImage(
                uri=await output.write_unique(names, data),
                task_id=result.task_id,
                format=info.format,
                size=len(data),
                sha256=sha256,
                width=info.width,
                height=info.height,
                flags=flags,
            )
        )
    return stored


async def place_stored_images(
    files: Sequence[str], output: OutputFolder, *, name: str, key: str
) -> list[str]:
    """Copy the images stored for a row's key to the row's own names, and return their URIs."""
    uris = []
    for number, file in enumerate(files, start=1):
        names = list_image_names(name, number, splitext(file)[1], key)
        if "://" in file:  # stored outside of the output
            uris.append(file)
            continue
        if file in names:
            uris.append(output.uri(file))
            continue
        image = await output.read(file)
        if image is None:
            raise StorageError(f"{output.uri(file)} was stored for this row and is missing.")
        uris.append(await output.write_unique(names, image))
    return uris


def _process(
    data: bytes, source: SourceType | None, find_flags: Callable[[Image.Image], list[str]] | None
) -> tuple[bytes, ImageInfo, str, list[str]]:
    """Check an image; return the bytes to store, format and size, their checksum, and flags."""
    info, image = decode_image(data)
    flags = [] if find_flags is None else find_flags(image)
    if source is not None:
        data = add_ai_metadata(data, source)
    return data, info, hashlib.sha256(data).hexdigest(), flags
