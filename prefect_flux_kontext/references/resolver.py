"""Check references that are not on the web, and make them available to the service."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from prefect_flux_kontext.errors import ReferenceImageError
from prefect_flux_kontext.images.headers import read_format
from prefect_flux_kontext.images.metadata import remove_metadata
from prefect_flux_kontext.references.identity import (
    identify_private_object,
    identify_reference,
    read_content,
    wrap_reference_errors,
)
from prefect_flux_kontext.references.location import (
    LocationKind,
    classify_location,
    non_public_references,
    open_filesystem,
)
from prefect_flux_kontext.references.staging import (
    STAGING_HINT,
    Locks,
    LoopbackStaging,
    Staging,
    choose_signature_lifetime,
    create_staging,
    is_loopback_url,
    sign_url,
)
from prefect_flux_kontext.references.validation import (
    MAX_REFERENCE_BYTES,
    check_image,
    needs_shrinking,
    shrink_to_fit,
)
from prefect_flux_kontext.storage.temp_db import open_temp_database

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Awaitable, Callable, Iterable, Mapping

    from prefect_flux_kontext.models import GenerationRequest
    from prefect_flux_kontext.settings import FluxKontextSettings

# Most of the time of a check is spent waiting for the store.
_MAX_THREADS = 16

RequestFactory: TypeAlias = "Callable[[], Awaitable[GenerationRequest]]"
"""Makes the request to send now. Its URLs may grant access, so the result is never stored."""


class ReferenceInfo(NamedTuple):
    """What is known about a reference that is not on the web."""

    identity: str = ""  # of its content; empty if it could not be read
    problem: str | None = None  # why it could not be read
    checked: bool = False
    flaw: str | None = None  # why its content is invalid
    large: bool = False  # its content must be shrunk
    staged: str | None = None  # name of the staged copy


class ReferenceCache:
    """Maps references to `ReferenceInfo` in a private temporary database. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None

    def get(self, reference: str) -> ReferenceInfo | None:
        """Return what is known about a reference, or None."""
        if self._connection is None:
            return None
        with self._lock:
            found = self._connection.execute(
                "SELECT identity, problem, checked, flaw, large, staged FROM infos "
                "WHERE reference = ?",
                (_cache_key(reference),),
            ).fetchone()
        return ReferenceInfo(*found) if found else None

    def put(self, reference: str, info: ReferenceInfo) -> None:
        """Store what is known about a reference; replaces an earlier entry."""
        with self._lock:
            self._database().execute(
                "INSERT OR REPLACE INTO infos VALUES (?, ?, ?, ?, ?, ?, ?)",
                (_cache_key(reference), *info),
            )

    def _database(self) -> sqlite3.Connection:
        if self._connection is None:
            self._connection = open_temp_database(
                "CREATE TABLE infos (reference BLOB PRIMARY KEY, identity TEXT, problem TEXT, "
                "checked INTEGER, flaw TEXT, large INTEGER, staged TEXT) WITHOUT ROWID"
            )
            weakref.finalize(self, self._connection.close)
        return self._connection


def _cache_key(reference: str) -> bytes:
    return hashlib.sha256(reference.encode(errors="surrogatepass")).digest()[:16]


class References:
    """Checks references that are not on the web, and gives the service access to them.

    Results are cached for the life of the object, from the plan to the last submit, so that the
    run pays for what was planned. With `fit`, images that are too large are shrunk instead of
    refused. Signed URLs live longer than the `timeout` of a wait.
    """

    def __init__(
        self,
        staging: Staging | LoopbackStaging | None = None,
        *,
        fit: bool = False,
        timeout: float = 0.0,
    ) -> None:
        self._staging = staging
        self._fit = fit
        self._seconds = choose_signature_lifetime(timeout)
        self._cache = ReferenceCache()
        self._locks = Locks()

    def close(self) -> None:
        """Stop serving files on loopback; the tasks that use them have ended."""
        if isinstance(self._staging, LoopbackStaging):
            self._staging.close()

    def identify(
        self, references: Iterable[str], versions: Mapping[str, str] | None = None
    ) -> dict[str, ReferenceInfo]:
        """Identify local files and objects, of which a listing may have given the versions."""
        for reference, version in (versions or {}).items():
            if (
                classify_location(reference) is LocationKind.PRIVATE
                and self._cache.get(reference) is None
            ):
                self._cache.put(
                    reference, ReferenceInfo(identify_private_object(reference, version))
                )
        infos = {reference: self._cache.get(reference) for reference in references}
        new = [reference for reference, info in infos.items() if info is None]
        for reference, info in zip(new, self._threads.map(_identify, new), strict=True):
            self._cache.put(reference, info)
            infos[reference] = info
        return {reference: info for reference, info in infos.items() if info is not None}

    def find_content_problems(self, references: Iterable[str]) -> dict[str, str]:
        """Check the content of identified references; return the problems by reference."""
        references = list(references)
        flaws = zip(references, self._threads.map(self._check_content, references), strict=True)
        return {reference: flaw for reference, flaw in flaws if flaw}

    async def prepare(
        self, request: GenerationRequest, *, verify_staged: bool = False
    ) -> RequestFactory:
        """Make the references of a request available to the service.

        URLs are signed only when the returned factory is called, right before the request is
        sent. With `verify_staged`, the service could not fetch them, so compare staged files.

        Raises:
            ReferenceImageError: A reference has changed since the plan, or is unusable.
            StorageError: The staging place refused a file.
        """
        own = non_public_references(request.image_urls)
        loop = asyncio.get_running_loop()
        pending = [
            loop.run_in_executor(self._threads, self._make_available, reference, verify_staged)
            for reference in own
        ]
        url_factories = dict(zip(own, await asyncio.gather(*pending), strict=True))

        async def create_request() -> GenerationRequest:
            if not own:
                return request
            urls = [
                await loop.run_in_executor(self._threads, url_factories[image])
                if image in url_factories
                else image
                for image in request.image_urls
            ]
            return request.model_copy(update={"image_urls": urls})

        return create_request

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        threads = ThreadPoolExecutor(_MAX_THREADS, "references")
        weakref.finalize(self, threads.shutdown, wait=False)
        return threads

    def _check_content(self, reference: str) -> str | None:
        info = self._cache.get(reference) or ReferenceInfo()
        if info.checked or info.problem:
            return info.flaw or info.problem
        try:
            with wrap_reference_errors(reference):
                self._read_checked(reference, info)
        except ReferenceImageError as error:
            self._cache.put(reference, info._replace(checked=True, flaw=error.message))
            return error.message
        return None

    def _read_checked(self, reference: str, info: ReferenceInfo) -> bytes:
        """Read the content of a reference, check it and record that it is valid."""
        if self._staging is None and classify_location(reference) is LocationKind.LOCAL:
            raise ReferenceImageError(
                f"is a local file, which the service cannot fetch; {STAGING_HINT}"
            )
        data = self._read_content(reference, info)
        check_image(data, fit=self._fit)
        large = needs_shrinking(data)
        if self._staging is None and large:
            raise ReferenceImageError(
                f"is too large, and its shrunk copy must be staged; {STAGING_HINT}"
            )
        self._cache.put(reference, info._replace(checked=True, large=large))
        return data

    def _read_content(self, reference: str, info: ReferenceInfo) -> bytes:
        data = read_content(reference, fit=self._fit)
        is_own = classify_location(reference) is LocationKind.LOCAL
        if is_own and f"sha256:{hashlib.sha256(data).hexdigest()}" != info.identity:
            raise ReferenceImageError("changed while it was checked")
        return data

    def _make_available(self, reference: str, verify_staged: bool) -> Callable[[], str]:
        """Stage a reference if needed; return a function that builds its URL."""
        # Rows with the same image stage it only once.
        with self._locks.get(reference):
            with wrap_reference_errors(reference):
                info = self._check_unchanged(reference)
            if info.flaw:
                raise ReferenceImageError(info.flaw)
            with wrap_reference_errors(reference):
                data = None if info.checked else self._read_checked(reference, info)
                info = self._cache.get(reference) or info
                if self._staging is None or not (
                    info.large or classify_location(reference) is LocationKind.LOCAL
                ):
                    fs, path = open_filesystem(reference)
                    return partial(sign_url, fs, path, self._seconds)
                name = info.staged
                if name is None or verify_staged:
                    data = data or self._read_content(reference, info)
                    data = shrink_to_fit(data, MAX_REFERENCE_BYTES) if info.large else data
                    data = remove_metadata(data)
                    name = self._staging.put(data, read_format(data), verify_staged=verify_staged)
                    self._cache.put(reference, info._replace(staged=name))
                return partial(self._staging.build_url, name, self._seconds)

    def _check_unchanged(self, reference: str) -> ReferenceInfo:
        identity = identify_reference(reference)
        info = self._cache.get(reference) or ReferenceInfo(identity)
        if info.identity != identity:
            raise ReferenceImageError(
                "has changed since the plan, so nothing was submitted for its row; run it again"
            )
        return info


def create_references(
    settings: FluxKontextSettings, base_url: str | None, *, timeout: float, fit: bool = False
) -> References:
    """Create the access to references that the settings describe.

    With a `base_url` this process runs until the tasks have ended, so without a staging place a
    service on loopback fetches local files from it.

    Raises:
        ConfigurationError: The staging settings are incomplete or invalid.
    """
    staging: Staging | LoopbackStaging | None = create_staging(
        settings.staging_url, settings.staging_public_url
    )
    if staging is None and base_url is not None and is_loopback_url(base_url):
        staging = LoopbackStaging()
    return References(staging, fit=fit, timeout=timeout)


def _identify(reference: str) -> ReferenceInfo:
    try:
        with wrap_reference_errors(reference):
            return ReferenceInfo(identify_reference(reference))
    except ReferenceImageError as error:
        return ReferenceInfo(problem=error.message)
