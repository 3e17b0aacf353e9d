"""What a reference image is, as far as its text tells: on the web, private, or on this machine."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urlsplit

import fsspec

if TYPE_CHECKING:
    from collections.abc import Iterable

# A letter and a colon are a drive of Windows, which is not a kind either.
_PROTOCOL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_PLAINLY_WEB = ("https://", "http://")
_SHOWN = 100


class Kind(Enum):
    """How the service gets a reference."""

    WEB = "goes as it is"
    PRIVATE = "is signed"
    OWN = "is staged"


_KINDS = {
    "http": Kind.WEB,
    "https": Kind.WEB,
    # Object stores whose fsspec filesystem signs URLs.
    "s3": Kind.PRIVATE,
    "s3a": Kind.PRIVATE,
    "gs": Kind.PRIVATE,
    "gcs": Kind.PRIVATE,
    "abfs": Kind.PRIVATE,
    "abfss": Kind.PRIVATE,
    "az": Kind.PRIVATE,
    # On this machine.
    "": Kind.OWN,
    "file": Kind.OWN,
    "local": Kind.OWN,
    "memory": Kind.OWN,
}


def protocol_of(reference: str) -> str:
    """The part before the colon, in small letters; nothing for a plain path."""
    found = _PROTOCOL.match(reference)
    return found.group(1).lower() if found else ""


def classify_location(reference: str) -> Kind | None:
    """How the service gets it; None for what it cannot be given."""
    return _KINDS.get(protocol_of(reference))


def non_public_references(references: Iterable[str]) -> list[str]:
    """Those of the references that the service cannot fetch as they are."""
    return [
        reference
        for reference in references
        if not reference.startswith(_PLAINLY_WEB) and classify_location(reference) is not Kind.WEB
    ]


def manifest_folder(manifest: Any) -> str | None:
    """Where relative paths in a manifest start; None where it may not name local files.

    A manifest beside its images is the usual case, and one from elsewhere that names files of
    this machine is a trap. Rows given directly start from the working directory.
    """
    if not isinstance(manifest, str):
        return str(Path.cwd())
    if protocol_of(manifest) == "memory":
        return str(Path.cwd())
    if classify_location(manifest) is not Kind.OWN:
        return None
    return str(Path(_path(manifest)).absolute().parent)


def locate(reference: str, folder: str | None) -> str:
    """The reference as fsspec spells it, with a local path made absolute."""
    if reference.startswith(_PLAINLY_WEB):
        return reference
    protocol = protocol_of(reference)
    if protocol not in ("", "file", "local"):
        web = classify_location(reference) is Kind.WEB
        return reference if web else protocol + reference[len(protocol) :]
    return reference if folder is None else str(Path(folder, _path(reference)))


def find_location_problem(reference: str, folder: str | None) -> str | None:
    """Why a reference that is not on the web cannot be given to the service, if so.

    Args:
        reference: As it is written.
        folder: What `folder_of` says of its manifest.
    """
    shown = f"image {reference[:_SHOWN]!r}"
    kind = classify_location(reference)
    unknown = kind is None or kind is Kind.WEB or not reference.strip()
    if unknown or "::" in reference or reference.startswith("//"):
        return (
            f"{shown} is not an http or https URL, nor in a bucket (s3:, gs:, abfs:, az:), nor a "
            "local file, so the service cannot fetch it"
        )
    if kind is Kind.OWN:
        if folder is None:
            return (
                f"{shown} is a local file, and the manifest is not: only a manifest on this "
                "machine, or rows given directly, may name local files"
            )
        return None
    parts = _parts(reference)
    if not parts.netloc or not parts.path.strip("/"):
        return f"{shown} names no object in a bucket"
    # `abfs://container@account/path` is no user name.
    if ":" in parts.netloc or ("@" in parts.netloc and protocol_of(reference)[0] != "a"):
        return f"image in {parts.scheme}: has a user name or password in its URL; leave it out"
    return None


def open_filesystem(reference: str) -> tuple[Any, str]:
    """The filesystem of a reference that is not on the web, and its path there.

    Listings are not kept: they would show objects as they were.

    Raises:
        Exception: Each filesystem has errors of its own.
    """
    if classify_location(reference) is Kind.OWN and protocol_of(reference) != "memory":
        return fsspec.filesystem("file", use_listings_cache=False), reference
    fs, path = fsspec.core.url_to_fs(reference, use_listings_cache=False)
    return fs, path


def _path(reference: str) -> str:
    """A local path without its `file://`. Nothing in it is decoded, as everywhere in fsspec."""
    return re.sub(r"^(?:file|local):(?://)?", "", reference, flags=re.IGNORECASE)


def _parts(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")
