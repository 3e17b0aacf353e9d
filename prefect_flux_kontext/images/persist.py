"""Download the images of a result, check them and store them in the output."""

from __future__ import annotations

import functools
import hashlib
import logging
from posixpath import splitext
from typing import TYPE_CHECKING

from prefect_flux_kontext.errors import StorageError
from prefect_flux_kontext.images.ai_metadata import add_ai_metadata
from prefect_flux_kontext.images.decode import EXTENSIONS, decode_image
from prefect_flux_kontext.images.download import download_image
from prefect_flux_kontext.models import StoredImage

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from PIL import Image

    from prefect_flux_kontext.client.transport import Connections
    from prefect_flux_kontext.images.ai_metadata import SourceType
    from prefect_flux_kontext.images.decode import ImageInfo
    from prefect_flux_kontext.models import GenerationResult
    from prefect_flux_kontext.storage.filesystem import OutputFolder

logger = logging.getLogger(__name__)


def image_names(name: str, number: int, extension: str, key: str | None) -> list[str]:
    """Return the possible file names of a result's image, the preferred one first.

    The preferred name is `cat.jpg`. If another row has it, the name gets the start of the row
    key: `cat~1a2b3c4d.jpg`. A second image of the same result is `cat~2.jpg`, and so on. No
    row's name ends in a tilde and few digits, so the names never collide with another row's.

    Args:
        name: The row's name below the output, already safe.
        number: Number of the image in the result, from 1.
        extension: Extension with its dot.
        key: The row key; None allows only the preferred name.
    """
    suffix = "" if number == 1 else f"~{number}"
    fallback = [] if key is None else [f"{name}~{key[:8]}{suffix}{extension}"]
    return [f"{name}{suffix}{extension}", *fallback]


async def persist_result(
    result: GenerationResult,
    output: OutputFolder,
    http: Connections,
    *,
    name: str,
    key: str | None = None,
    ai_mark: bool = True,
    show: Callable[[Image.Image], None] | None = None,
) -> list[StoredImage]:
    """Download every image of a result, check it and store it.

    A complete image in another format than requested is stored too, since it is paid for.

    Args:
        result: Result of the paid task.
        output: Folder for the images.
        http: Connections made by `open_download_client`.
        name: Name below the output, already safe, without extension. A second image gets the
            suffix `~2`, and so on.
        key: The row key, which protects images of other rows from being overwritten; with
            None, a file of that name is overwritten.
        ai_mark: Whether to mark images as made by AI; see `ai_metadata`.
        show: Called with the first decoded image, in a thread; must not raise.

    Returns:
        One record for each image, in the order of the result's URLs.

    Raises:
        DownloadError: A URL could not be fetched, after several attempts.
        RefusedUrlError: A URL is not allowed; no request was sent.
        InvalidImageError: A URL does not serve a complete image.
        StorageError: The output refused the file.
    """
    requested = result.request.output_format if result.request else None
    source = _choose_source_type(result) if ai_mark else None
    stored = []
    for number, url in enumerate(result.result_urls, start=1):
        data, image, sha256 = await download_image(
            url,
            http,
            functools.partial(_process_image, source=source, show=show if number == 1 else None),
            task_id=result.task_id,
        )
        if requested not in (None, image.format):
            logger.warning(
                "Task %s returned a %s instead of the requested %s; the image is stored in its "
                "own format.",
                result.task_id,
                image.format.upper(),
                str(requested).upper(),
            )
        names = image_names(name, number, f".{EXTENSIONS[image.format]}", key)
        stored.append(
            StoredImage(
                uri=await output.write_unique(names, data),
                task_id=result.task_id,
                format=image.format,
                size=len(data),
                sha256=sha256,
                width=image.width,
                height=image.height,
            )
        )
    return stored


async def place_stored_images(
    files: Sequence[str], output: OutputFolder, *, name: str, key: str
) -> list[str]:
    """Store the images that exist for a key under a row's name; return their URIs.

    Raises:
        StorageError: An image no longer exists, or the output refused a file.
    """
    uris = []
    for number, file in enumerate(files, start=1):
        names = image_names(name, number, splitext(file)[1], key)
        if file in names:
            uris.append(output.uri(file))
            continue
        image = await output.read(file)
        if image is None:
            raise StorageError(f"{output.uri(file)} was stored for this row but no longer exists.")
        uris.append(await output.write_unique(names, image))
    return uris


def _process_image(
    data: bytes, source: SourceType | None, show: Callable[[Image.Image], None] | None
) -> tuple[bytes, ImageInfo, str]:
    """Return the bytes to store, their format and size, and their SHA-256 checksum."""
    image, picture = decode_image(data)
    if show is not None:
        show(picture)
    if source is not None:
        data = add_ai_metadata(data, source)
    return data, image, hashlib.sha256(data).hexdigest()


def _choose_source_type(result: GenerationResult) -> SourceType:
    restyled = result.request is not None and result.request.image_urls
    return "compositeWithTrainedAlgorithmicMedia" if restyled else "trainedAlgorithmicMedia"
