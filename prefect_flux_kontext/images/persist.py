"""From a result's URLs to checked images in their place."""

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
    """The file names a result's image may have, the wanted one first.

    `cat.jpg`, and where that is another row's image already, `cat~1a2b3c4d.jpg` after the row
    key. A second image of the same result is `cat~2.jpg`, and so on. No row's name ends in a
    tilde and so few digits, so no name is that of another row.

    Args:
        name: The row's name below the output, already safe.
        number: Which image of the result, from 1.
        extension: With its dot.
        key: The row key; None where there is only the wanted name.
    """
    which = "" if number == 1 else f"~{number}"
    apart = [] if key is None else [f"{name}~{key[:8]}{which}{extension}"]
    return [f"{name}{which}{extension}", *apart]


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
    """Download every image of a result, check it and put it in its place.

    A whole image of another kind than was asked for is stored too, as what it is: it is paid for.

    Args:
        result: What came of the task.
        output: Where the images go.
        http: Connections made by `download_client`.
        name: Name below the output, already safe, without extension; a second image gets `~2`
            after it, and so on.
        key: The row key, for which no other row's image is written over; None writes over
            what has that name.
        ai_mark: Whether the image is marked as made by AI; see `provenance`.
        show: Is given the first picture while it is decoded, in a thread; it must not raise.

    Returns:
        One record for each image, in the order of the result's URLs.

    Raises:
        DownloadError: A URL could not be fetched, after several attempts.
        RefusedUrlError: A URL leads where no download may go; it was not asked.
        InvalidImageError: What it serves is not a whole image.
        StorageError: The output refused the file.
    """
    asked = result.request.output_format if result.request else None
    source = _source(result) if ai_mark else None
    stored = []
    for number, url in enumerate(result.result_urls, start=1):
        data, image, sha256 = await download_image(
            url,
            http,
            functools.partial(_finished, source=source, show=show if number == 1 else None),
            task_id=result.task_id,
        )
        if asked not in (None, image.format):
            logger.warning(
                "Task %s was asked for a %s and has made a %s, which is stored as such.",
                result.task_id,
                str(asked).upper(),
                image.format.upper(),
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
    """Give a row the images that are stored for its key already, and return their URIs.

    Raises:
        StorageError: One of them is gone, or the filesystem refused.
    """
    uris = []
    for number, file in enumerate(files, start=1):
        names = image_names(name, number, splitext(file)[1], key)
        if file in names:
            uris.append(output.uri(file))
            continue
        image = await output.read(file)
        if image is None:
            raise StorageError(f"{output.uri(file)} was stored for this row and is gone.")
        uris.append(await output.write_unique(names, image))
    return uris


def _finished(
    data: bytes, source: SourceType | None, show: Callable[[Image.Image], None] | None
) -> tuple[bytes, ImageInfo, str]:
    """The bytes to store, what they are, and their checksum."""
    image, picture = decode_image(data)
    if show is not None:
        show(picture)
    if source is not None:
        data = add_ai_metadata(data, source)
    return data, image, hashlib.sha256(data).hexdigest()


def _source(result: GenerationResult) -> SourceType:
    restyled = result.request is not None and result.request.image_urls
    return "compositeWithTrainedAlgorithmicMedia" if restyled else "trainedAlgorithmicMedia"
