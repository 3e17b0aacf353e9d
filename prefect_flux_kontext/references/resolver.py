"""Locks by name, as many as are in use."""

from __future__ import annotations

import asyncio
import hashlib
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import TYPE_CHECKING, TypeAlias

from prefect_flux_kontext.errors import ReferenceImageError
from prefect_flux_kontext.images.headers import read_format
from prefect_flux_kontext.references.cache import Locks, ReferenceCache, ReferenceInfo
from prefect_flux_kontext.references.identity import (
    describe_reference,
    hash_content,
    identify_private_object,
    identify_reference,
)
from prefect_flux_kontext.references.location import (
    Kind,
    classify_location,
    non_public_references,
    open_filesystem,
)
from prefect_flux_kontext.references.resizing import shrink_to_fit
from prefect_flux_kontext.references.staging import (
    NOT_SET,
    Staging,
    create_staging,
    sign_url,
    signature_lifetime,
)
from prefect_flux_kontext.references.validation import (
    MAX_REFERENCE_BYTES,
    check_image,
    needs_shrinking,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping

    from prefect_flux_kontext.models import GenerationRequest
    from prefect_flux_kontext.settings import FluxKontextSettings


_AT_ONCE = 16

Sending: TypeAlias = "Callable[[], Awaitable[GenerationRequest]]"
"""Makes the request as it is to be sent now. Its URLs give access, so it is kept nowhere."""


class References:
    """How reference images that are not on the web get to the service.

    What it has found out of a reference once stands for as long as it lives, from the plan to
    the last submit, so that what is paid for is what was planned.

    Args:
        staging: Where files of this machine are put; None where there is no such place.
        fit: Shrink what is too large, rather than refuse it.
        timeout: Seconds after which the wait for a task is given up; signatures outlast it.
    """

    def __init__(
        self, staging: Staging | None = None, *, fit: bool = False, timeout: float = 0.0
    ) -> None:
        self._staging = staging
        self._fit = fit
        self._seconds = signature_lifetime(timeout)
        self._known = ReferenceCache()
        self._locks = Locks()

    def look_at(
        self, references: Iterable[str], versions: Mapping[str, str] | None = None
    ) -> dict[str, ReferenceInfo]:
        """What the references are known by, of which several are looked at at a time.

        Args:
            references: Local files, or objects in buckets.
            versions: What a listing has said of some of the objects, by reference.
        """
        for reference, version in (versions or {}).items():
            if classify_location(reference) is Kind.PRIVATE and self._known.get(reference) is None:
                self._known.put(
                    reference, ReferenceInfo(identify_private_object(reference, version))
                )
        looks = {reference: self._known.get(reference) for reference in references}
        new = [reference for reference, look in looks.items() if look is None]
        for reference, look in zip(new, self._threads.map(_look_at, new), strict=True):
            self._known.put(reference, look)
            looks[reference] = look
        return {reference: look for reference, look in looks.items() if look is not None}

    def flaws(self, references: Iterable[str]) -> dict[str, str]:
        """What is wrong with the content of references that were looked at, several at a time."""
        references = list(references)
        flaws = zip(references, self._threads.map(self._flaw, references), strict=True)
        return {reference: flaw for reference, flaw in flaws if flaw}

    async def prepared(self, request: GenerationRequest, *, doubted: bool = False) -> Sending:
        """Have the request's references where the service can fetch them.

        Nothing is signed until the request is about to be sent.

        Args:
            request: With references as the manifest has them.
            doubted: The service could not fetch them before, so what is staged is compared.

        Raises:
            ReferenceImageError: One has changed since it was looked at, or is not to be used.
            StorageError: The staging place refused one.
        """
        own = non_public_references(request.image_urls)
        loop = asyncio.get_running_loop()
        ready = [
            loop.run_in_executor(self._threads, self._ready, reference, doubted)
            for reference in own
        ]
        url_of = dict(zip(own, await asyncio.gather(*ready), strict=True))

        async def sending() -> GenerationRequest:
            if not own:
                return request
            urls = [
                await loop.run_in_executor(self._threads, url_of[image])
                if image in url_of
                else image
                for image in request.image_urls
            ]
            return request.model_copy(update={"image_urls": urls})

        return sending

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        threads = ThreadPoolExecutor(_AT_ONCE, "references")
        weakref.finalize(self, threads.shutdown, wait=False)
        return threads

    def _flaw(self, reference: str) -> str | None:
        look = self._known.get(reference) or ReferenceInfo()
        if look.checked or look.problem:
            return look.flaw or look.problem
        try:
            with describe_reference(reference):
                self._checked(reference, look)
        except ReferenceImageError as error:
            self._known.put(reference, look._replace(checked=True, flaw=error.message))
            return error.message
        return None

    def _checked(self, reference: str, look: ReferenceInfo) -> bytes:
        """The content of a reference, which is from now on known to be good."""
        if self._staging is None and classify_location(reference) is Kind.OWN:
            raise ReferenceImageError(
                f"is a local file, which the service cannot fetch; {NOT_SET}"
            )
        data = self._content(reference, look)
        check_image(data, fit=self._fit)
        large = needs_shrinking(data)
        if self._staging is None and large:
            raise ReferenceImageError(
                f"is too large, and once it is shrunk it has to be somewhere; {NOT_SET}"
            )
        self._known.put(reference, look._replace(checked=True, large=large))
        return data

    def _content(self, reference: str, look: ReferenceInfo) -> bytes:
        data = hash_content(reference, fit=self._fit)
        is_own = classify_location(reference) is Kind.OWN
        if is_own and f"sha256:{hashlib.sha256(data).hexdigest()}" != look.identity:
            raise ReferenceImageError("has changed while it was looked at")
        return data

    def _ready(self, reference: str, doubted: bool) -> Callable[[], str]:
        """Have a reference where the service can fetch it, and return what tells its URL."""
        # Rows of the same image wait for the first of them to stage it.
        with self._locks.of(reference):
            with describe_reference(reference):
                look = self._unchanged(reference)
            if look.flaw:
                raise ReferenceImageError(look.flaw)
            with describe_reference(reference):
                data = None if look.checked else self._checked(reference, look)
                look = self._known.get(reference) or look
                if self._staging is None or not (
                    look.large or classify_location(reference) is Kind.OWN
                ):
                    fs, path = open_filesystem(reference)
                    return partial(sign_url, fs, path, self._seconds)
                name = look.staged
                if name is None or doubted:
                    data = data or self._content(reference, look)
                    data = shrink_to_fit(data, MAX_REFERENCE_BYTES) if look.large else data
                    name = self._staging.put(data, read_format(data), doubted=doubted)
                    self._known.put(reference, look._replace(staged=name))
                return partial(self._staging.url_of, name, self._seconds)

    def _unchanged(self, reference: str) -> ReferenceInfo:
        identity = identify_reference(reference)
        look = self._known.get(reference) or ReferenceInfo(identity)
        if look.identity != identity:
            raise ReferenceImageError(
                "has changed since the plan, so nothing was submitted for its row; run it again"
            )
        return look


def create_references(
    settings: FluxKontextSettings, *, timeout: float, fit: bool = False
) -> References:
    """How references get to the service, as the environment says.

    Args:
        settings: Name the staging place.
        timeout: Seconds after which the wait for a task is given up.
        fit: Shrink what is too large.

    Raises:
        ConfigurationError: The staging place is not usable.
    """
    staging = create_staging(settings.staging_url, settings.staging_public_url)
    return References(staging, fit=fit, timeout=timeout)


def _look_at(reference: str) -> ReferenceInfo:
    try:
        with describe_reference(reference):
            return ReferenceInfo(identify_reference(reference))
    except ReferenceImageError as error:
        return ReferenceInfo(problem=error.message)
