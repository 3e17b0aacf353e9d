"""Location of a reference image, judged by its text: web, private bucket or this machine."""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any

import fsspec

from prefect_flux_kontext.redaction import redact_url

# A single letter and a colon are a Windows drive, which is not a supported kind either.
# Before `://`, fsspec takes anything as a protocol, such as `arrow_hdfs`.
_PROTOCOL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)(?=:)|([^/\\:]+)(?=://)")
_WEB_PREFIXES = ("https://", "http://")
PLAIN_URL = re.compile(
    r"https?://((?:[a-z0-9-]+\.)+[a-z]{2,})(?:/[A-Za-z0-9._~-]*)*(\?[A-Za-z0-9._~=&%-]*)?"
)
"""A URL that needs no parser: its host and its query are the groups. Most references are such."""
_MAX_SHOWN_CHARACTERS = 100
_OTHER_FORMATS = frozenset(
    (
        *("avif", "bmp", "cr2", "dng", "gif", "heic", "heif", "jp2", "jxl", "mov", "mp4", "nef"),
        *("pdf", "psd", "svg", "svgz", "tif", "tiff", "webm", "zip"),
    )
)
_SHARE_PAGE = re.compile(
    r"https?://(?:"
    r"(?:drive|docs)\.google\.com/(?:file/|open\?|drive/)"
    r"|photos\.(?:app\.goo\.gl|google\.com)/"
    r"|(?:www\.)?dropbox\.com/(?!.*[?&](?:raw|dl)=1)"
    r"|(?:onedrive\.live\.com|1drv\.ms)/"
    r"|www\.icloud\.com/)",
    re.IGNORECASE,
)
"""Pages of file sharing services. The service gets HTML there."""


class LocationKind(Enum):
    """How the service gets a reference."""

    WEB = "sent unchanged"
    PRIVATE = "signed"
    LOCAL = "staged"


_KIND_BY_PROTOCOL = {
    **dict.fromkeys(("http", "https"), LocationKind.WEB),
    # Object stores whose fsspec filesystem signs URLs.
    **dict.fromkeys(("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"), LocationKind.PRIVATE),
    # On this machine.
    **dict.fromkeys(("", "file", "local", "memory"), LocationKind.LOCAL),
}


def parse_protocol(reference: str) -> str:
    """Return the protocol in lower case, or an empty string for a plain path."""
    found = _PROTOCOL.match(reference)
    return found[0].lower() if found else ""


def classify_location(reference: str) -> LocationKind | None:
    """Return how the service gets a reference, or None for an unsupported protocol."""
    if reference.startswith(_WEB_PREFIXES):
        return LocationKind.WEB
    return _KIND_BY_PROTOCOL.get(parse_protocol(reference))


def is_share_page(reference: str) -> bool:
    """Return whether a URL is a page that shows an image, and not the image."""
    return reference.startswith(_WEB_PREFIXES) and bool(_SHARE_PAGE.match(reference))


def has_other_format(reference: str) -> bool:
    """Return whether a URL is named as a file of a format that the service does not take."""
    path = reference.partition("?")[0].partition("#")[0]
    extension = path.rpartition(".")[2].lower()
    return extension in _OTHER_FORMATS and reference.startswith(_WEB_PREFIXES)


def non_public_references(references: Iterable[str]) -> list[str]:
    """Return the references that the service cannot fetch as they are."""
    return [
        reference
        for reference in references
        if not reference.startswith(_WEB_PREFIXES)
        and classify_location(reference) is not LocationKind.WEB
    ]


def find_manifest_folder(manifest: Any) -> str | None:
    """Return the base folder for relative paths, or None if local files are not allowed.

    A local manifest usually lies beside its images. A remote manifest must not read files of
    this machine. Rows given directly are relative to the working directory.
    """
    if not isinstance(manifest, str) or parse_protocol(manifest) == "memory":
        return str(Path.cwd())
    if classify_location(manifest) is not LocationKind.LOCAL:
        return None
    return str(Path(_local_path(manifest)).absolute().parent)


def normalize_reference(reference: str, folder: str | None) -> str:
    """Normalize a reference for fsspec, with a local path made absolute."""
    if reference.startswith(_WEB_PREFIXES):
        return reference
    protocol = parse_protocol(reference)
    if protocol not in ("", "file", "local"):
        web = classify_location(reference) is LocationKind.WEB
        return reference if web else protocol + reference[len(protocol) :]
    return reference if folder is None else str(Path(folder, _local_path(reference)))


def find_location_problem(reference: str) -> str | None:
    """Return why the service cannot use a reference that is not on the web, or None."""
    shown = f"image {redact_url(reference)[:_MAX_SHOWN_CHARACTERS]!r}"
    kind = classify_location(reference)
    unknown = kind is None or kind is LocationKind.WEB or not reference.strip()
    if unknown or "::" in reference or reference.startswith("//"):
        return (
            f"{shown} is not an http or https URL, nor in a bucket (s3:, gs:, abfs:, az:), nor a "
            "local file, so the service cannot fetch it"
        )
    if kind is LocationKind.LOCAL:
        return None
    # A key may hold any character, such as `#` and `?`, so this is not split as a URL.
    protocol, rest = parse_protocol(reference), reference.partition("://")[2]
    bucket, _, key = rest.partition("/")
    if not bucket or not key.strip("/"):
        return f"{shown} does not name an object in a bucket"
    # In `abfs://container@account/path`, the part before `@` is not a user name.
    if ":" in bucket or ("@" in bucket and protocol[0] != "a"):
        return f"image in {protocol}: has a user name or password in its URL; leave it out"
    return None


def open_filesystem(reference: str) -> tuple[Any, str]:
    """Return the filesystem of a reference that is not on the web, and its path there.

    The listings cache is off, because it would show outdated objects.
    """
    if (
        classify_location(reference) is LocationKind.LOCAL
        and parse_protocol(reference) != "memory"
    ):
        return fsspec.filesystem("file", use_listings_cache=False), reference
    fs, path = fsspec.core.url_to_fs(reference, use_listings_cache=False)
    return fs, path


def _local_path(reference: str) -> str:
    """Strip `file://` from a local path. As in fsspec, nothing is percent-decoded."""
    return re.sub(r"^(?:file|local):(?://)?", "", reference, flags=re.IGNORECASE)
