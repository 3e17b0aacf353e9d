"""Signed URLs: whoever holds one reads the object, so it is made when it is sent and not kept."""

from __future__ import annotations

import hashlib
import math
from typing import Any
from urllib.parse import urlsplit

import fsspec

from prefect_flux_kontext.errors import ConfigurationError, ReferenceImageError, StorageError
from prefect_flux_kontext.images.decode import EXTENSIONS, ImageFormat
from prefect_flux_kontext.references.cache import Locks
from prefect_flux_kontext.references.location import Kind, classify_location
from prefect_flux_kontext.storage.atomic import create_file, replace_file

_SHORTEST = 3_600
_LONGEST = 7 * 24 * 3_600
"""Seconds; S3 signs for no longer than a week."""


def signature_lifetime(timeout: float) -> int:
    """Seconds for which a signed URL is good: longer than the service queues and works.

    Args:
        timeout: Seconds after which the wait for a task is given up.
    """
    return min(max(_SHORTEST, math.ceil(2 * timeout)), _LONGEST)


def sign_url(fs: Any, path: str, seconds: int) -> str:
    """A URL under which anybody can read the object for so long.

    Raises:
        ReferenceImageError: The filesystem cannot sign, or may not.
    """
    try:
        url = str(fs.sign(path, expiration=seconds))
    except Exception as error:  # noqa: BLE001 - each filesystem has errors of its own
        # Not its text: who knows how much of a signature is in it.
        raise ReferenceImageError(
            f"{path} cannot be signed ({type(error).__name__}); check that the credentials in use "
            "can sign, and may read it. Nothing was submitted for its row."
        ) from None
    if not url.startswith(("https://", "http://")):
        raise ReferenceImageError(f"{path} was signed as something that is no URL.")
    return url


NOT_SET = (
    "set FLUX_KONTEXT_STAGING_URL (a folder or bucket to put it into) and "
    "FLUX_KONTEXT_STAGING_PUBLIC_URL (where that is on the web)"
)


class Staging:
    """A folder or bucket whose files the service can fetch.

    Args:
        url: The place, as a path or fsspec URL.
        public_url: The same place as an http or https URL; without one, URLs are signed.

    Raises:
        ConfigurationError: It is no one place, or nobody could fetch from it.
    """

    def __init__(self, url: str, public_url: str | None = None) -> None:
        if "::" in url:
            raise ConfigurationError(
                f"FLUX_KONTEXT_STAGING_URL {url!r} chains several filesystems; give one URL."
            )
        if public_url is not None and not _is_on_the_web(public_url):
            raise ConfigurationError(
                f"FLUX_KONTEXT_STAGING_PUBLIC_URL {public_url!r} is not an http or https URL "
                "without a query."
            )
        if public_url is None and classify_location(url) is not Kind.PRIVATE:
            raise ConfigurationError(
                f"URLs of files in FLUX_KONTEXT_STAGING_URL {url!r} cannot be signed; set "
                "FLUX_KONTEXT_STAGING_PUBLIC_URL to where it is on the web."
            )
        self._locks = Locks()
        self._public = public_url.rstrip("/") if public_url else None
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except Exception as error:  # noqa: BLE001 - each filesystem has errors of its own
            raise ConfigurationError(
                f"FLUX_KONTEXT_STAGING_URL {url!r} cannot be used: {error}"
            ) from None

    def put(self, data: bytes, kind: ImageFormat, *, doubted: bool = False) -> str:
        """Put a file where it is not yet, and return its name: its checksum.

        Args:
            data: The whole file.
            kind: What it is, for the name's extension.
            doubted: The service could not fetch it, so what is there is read and compared.

        Raises:
            StorageError: The place refused it.
        """
        name = f"{hashlib.sha256(data).hexdigest()}.{EXTENSIONS[kind]}"
        path = self._path(name)
        try:
            # Equal files wait for the first of them to be there.
            with self._locks.of(name):
                if not self._has(path, data, doubted=doubted):
                    self._write(path, data)
        except Exception as error:  # noqa: BLE001 - each filesystem has errors of its own
            raise StorageError(
                f"The staging place refused {name}: {type(error).__name__}: {error}. Nothing was "
                "submitted for its row."
            ) from None
        return name

    def url_of(self, name: str, seconds: int) -> str:
        """Where the service fetches a file that was put here.

        Args:
            name: What `put` returned.
            seconds: How long it must be there, where the URL is signed.

        Raises:
            ReferenceImageError: It cannot be signed.
        """
        if self._public is not None:
            return f"{self._public}/{name}"
        return sign_url(self._fs, self._path(name), seconds)

    def _has(self, path: str, data: bytes, *, doubted: bool) -> bool:
        try:
            if doubted:
                return bool(self._fs.cat_file(path) == data)
            return bool(self._fs.info(path)["size"] == len(data))
        except FileNotFoundError:
            return False

    def _write(self, path: str, data: bytes) -> None:
        try:
            create_file(self._fs, path, data)
        except FileExistsError:
            # Another run's file of that checksum, or half of one.
            if not self._has(path, data, doubted=True):
                replace_file(self._fs, path, data)

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"


def _is_on_the_web(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    plain = not (parts.query or parts.fragment or parts.username or parts.password)
    return parts.scheme in ("http", "https") and bool(parts.hostname) and plain


def create_staging(url: str | None, public_url: str | None) -> Staging | None:
    """The staging place of the settings, if there is one.

    Raises:
        ConfigurationError: It is not usable.
    """
    if url is None:
        if public_url is not None:
            raise ConfigurationError(
                "FLUX_KONTEXT_STAGING_PUBLIC_URL is set and FLUX_KONTEXT_STAGING_URL is not: set "
                "both."
            )
        return None
    return Staging(url, public_url)
