"""Give the service access to references: signed URLs and a staging place for files.

A signed URL grants access to its object, so it is created right before it is sent, never stored.
"""

from __future__ import annotations

import functools
import hashlib
import http.server
import math
import secrets
import tempfile
import threading
import weakref
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

import fsspec

from prefect_flux_kontext.client.addresses import is_loopback_host
from prefect_flux_kontext.errors import ConfigurationError, ReferenceImageError, StorageError
from prefect_flux_kontext.images.decode import EXTENSIONS, ImageFormat
from prefect_flux_kontext.redaction import has_password
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


class Locks:
    """One lock per name; a lock is dropped when nothing refers to it."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locks: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()

    def get(self, name: str) -> threading.Lock:
        """Return the lock of a name. Keep a reference to it while using it."""
        with self._guard:
            return self._locks.setdefault(name, threading.Lock())


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


class LoopbackStaging:
    """Serves staged files on loopback, below an unguessable path, until it is closed.

    The server starts with the first file.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._staging: Staging | None = None
        self._resources = ExitStack()
        weakref.finalize(self, self._resources.close)

    def put(self, data: bytes, kind: ImageFormat, *, verify_staged: bool = False) -> str:
        """Stage a file and return its name; see `Staging.put`."""
        return self._open().put(data, kind, verify_staged=verify_staged)

    def build_url(self, name: str, seconds: int) -> str:
        """Return the URL of a staged file; see `Staging.build_url`."""
        return self._open().build_url(name, seconds)

    def close(self) -> None:
        """Stop serving and remove the staged files."""
        self._resources.close()

    def _open(self) -> Staging:
        with self._lock:
            if self._staging is None:
                folder = self._resources.enter_context(
                    tempfile.TemporaryDirectory(prefix="flux-kontext-references-")
                )
                handler = functools.partial(_FileHandler, directory=folder)
                server = self._resources.enter_context(_Server(("127.0.0.1", 0), handler))
                self._resources.callback(server.shutdown)
                threading.Thread(target=server.serve_forever, daemon=True).start()
                token = secrets.token_urlsafe()
                url = f"http://127.0.0.1:{server.server_port}/{token}"
                self._staging = Staging(f"{folder}/{token}", url)
            return self._staging


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # the service may fetch many files at a time


class _FileHandler(http.server.SimpleHTTPRequestHandler):
    def list_directory(self, _path: Any) -> None:
        # A listing would tell the path.
        self.send_error(404)

    def log_message(self, *_: Any) -> None:
        """Log nothing: the URLs grant access."""


def is_loopback_url(url: str) -> bool:
    """Whether a URL leads to this machine, judged by its text."""
    try:
        return is_loopback_host(urlsplit(url).hostname)
    except ValueError:
        return False
