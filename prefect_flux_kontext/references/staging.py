"""Give the service access to references: signed URLs and a staging place for files.

A signed URL grants access to its object, so it is created right before it is sent, never stored.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any
from urllib.parse import urlsplit

import fsspec

from prefect_flux_kontext.errors import ConfigurationError, ReferenceImageError, StorageError
from prefect_flux_kontext.images.decode import EXTENSIONS, ImageFormat
from prefect_flux_kontext.redaction import has_password
from prefect_flux_kontext.references.cache import Locks
from prefect_flux_kontext.references.location import LocationKind, classify_location
from prefect_flux_kontext.storage.atomic import create_file, replace_file

STAGING_HINT = (
    "set FLUX_KONTEXT_STAGING_URL (a folder or bucket for the files) and "
    "FLUX_KONTEXT_STAGING_PUBLIC_URL (its URL on the web)"
)

# Leaves time for the service's queue, also with a short timeout.
_MIN_SIGNATURE_SECONDS = 3_600
# S3 signs for at most a week.
_MAX_SIGNATURE_SECONDS = 7 * 24 * 3_600


def choose_signature_lifetime(timeout: float) -> int:
    """Return the seconds for which to sign a URL: twice the timeout, an hour to a week."""
    return min(max(_MIN_SIGNATURE_SECONDS, math.ceil(2 * timeout)), _MAX_SIGNATURE_SECONDS)


def sign_url(fs: Any, path: str, seconds: int) -> str:
    """Sign a URL that lets anybody read an object for a number of seconds."""
    try:
        url = str(fs.sign(path, expiration=seconds))
    except Exception as error:  # noqa: BLE001 - each filesystem has errors of its own
        # The text of the error is left out, since it may contain a signature.
        raise ReferenceImageError(
            f"{path} cannot be signed ({type(error).__name__}); check that the credentials in use "
            "can sign and can read it. Nothing was submitted for its row."
        ) from None
    if not url.startswith(("https://", "http://")):
        raise ReferenceImageError(
            f"{path} cannot be signed: the filesystem returned no http or https URL."
        )
    return url


class Staging:
    """A staging place: a folder or bucket whose files the service can fetch.

    URLs are signed if the place has no public http or https URL.

    Raises:
        ConfigurationError: A URL is invalid, or the service could not fetch from the place.
    """

    def __init__(self, url: str, public_url: str | None = None) -> None:
        if "::" in url:
            raise ConfigurationError(
                f"FLUX_KONTEXT_STAGING_URL {url!r} chains several filesystems; use a single URL."
            )
        if has_password(url):
            raise ConfigurationError(
                f"FLUX_KONTEXT_STAGING_URL {url!r} has a user name or password in its URL; leave "
                "them out and use the store's own credentials."
            )
        if public_url is not None and not _is_public_url(public_url):
            raise ConfigurationError(
                f"FLUX_KONTEXT_STAGING_PUBLIC_URL {public_url!r} is not an http or https URL "
                "without a query."
            )
        if public_url is None and classify_location(url) is not LocationKind.PRIVATE:
            raise ConfigurationError(
                f"URLs of files in FLUX_KONTEXT_STAGING_URL {url!r} cannot be signed; set "
                "FLUX_KONTEXT_STAGING_PUBLIC_URL to its URL on the web."
            )
        self._locks = Locks()
        self._public_url = public_url.rstrip("/") if public_url else None
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except Exception as error:  # noqa: BLE001 - each filesystem has errors of its own
            raise ConfigurationError(
                f"FLUX_KONTEXT_STAGING_URL {url!r} cannot be used: {error}"
            ) from None

    def put(self, data: bytes, kind: ImageFormat, *, verify_staged: bool = False) -> str:
        """Stage a file unless it is there, and return its name, which holds its checksum.

        With `verify_staged`, the service could not fetch it, so the staged content is compared.
        """
        name = f"{hashlib.sha256(data).hexdigest()}.{EXTENSIONS[kind]}"
        path = self._build_path(name)
        try:
            # Stage equal files only once.
            with self._locks.get(name):
                if not self._is_staged(path, data, verify_staged=verify_staged):
                    self._write(path, data)
        except Exception as error:  # noqa: BLE001 - each filesystem has errors of its own
            raise StorageError(
                f"The staging place refused {name}: {type(error).__name__}: {error}. Nothing was "
                "submitted for its row."
            ) from None
        return name

    def build_url(self, name: str, seconds: int) -> str:
        """Return the URL from which the service fetches a staged file."""
        if self._public_url is not None:
            return f"{self._public_url}/{name}"
        return sign_url(self._fs, self._build_path(name), seconds)

    def _is_staged(self, path: str, data: bytes, *, verify_staged: bool) -> bool:
        try:
            if verify_staged:
                return bool(self._fs.cat_file(path) == data)
            return bool(self._fs.info(path)["size"] == len(data))
        except FileNotFoundError:
            return False

    def _write(self, path: str, data: bytes) -> None:
        try:
            create_file(self._fs, path, data)
        except FileExistsError:
            # Another run staged it, or left an incomplete file.
            if not self._is_staged(path, data, verify_staged=True):
                replace_file(self._fs, path, data)

    def _build_path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"


def _is_public_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    has_no_extras = not (parts.query or parts.fragment or parts.username or parts.password)
    return parts.scheme in ("http", "https") and bool(parts.hostname) and has_no_extras


def create_staging(url: str | None, public_url: str | None) -> Staging | None:
    """Create the staging place of the settings, if one is set."""
    if url is None:
        if public_url is not None:
            raise ConfigurationError(
                "FLUX_KONTEXT_STAGING_PUBLIC_URL is set but FLUX_KONTEXT_STAGING_URL is not: set "
                "both."
            )
        return None
    return Staging(url, public_url)
