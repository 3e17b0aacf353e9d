"""Identity of references, so that changed content makes a new row; errors that name them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from prefect_flux_kontext.errors import FluxKontextError, ReferenceImageError
from prefect_flux_kontext.redaction import redact_url
from prefect_flux_kontext.references.location import (
    PLAIN_URL,
    LocationKind,
    classify_location,
    open_filesystem,
)
from prefect_flux_kontext.references.validation import MAX_SHRINKABLE_BYTES, check_size

_CHUNK_BYTES = 2**20
_MAX_SHOWN_CHARACTERS = 200

# Parameters of a signed URL say who may read it and for how long, not what it holds. These
# prefixes are always part of a signature: AWS and Google Cloud.
_SIGNATURE_PARAMETERS = re.compile(r"x-(amz|goog)-.*")
# Plain names may identify the content, so they count only beside the parameter in the key.
_PARAMETERS_BESIDE = {
    # AWS, Google Cloud and CloudFront
    "signature": re.compile(
        r"signature|expires|awsaccesskeyid|googleaccessid|key-pair-id|policy|hash-algorithm"
    ),
    # Azure shared access signatures
    "sig": re.compile(r"sig|se|sp|sv|sr|ss|st|sip|spr|srt|sdd|skoid|sktid|skt|ske|sks|skv"),
}


def identify_reference(reference: str) -> str:
    """Return what identifies a local file (a checksum) or an object (its URL and ETag)."""
    fs, path = open_filesystem(reference)
    info = _get_file_info(fs, path)
    if classify_location(reference) is LocationKind.PRIVATE:
        return identify_private_object(reference, read_version(info))
    check_size(int(info["size"]), fit=True)
    digest = hashlib.sha256()
    with fs.open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"


def identify_private_object(reference: str, version: str | None) -> str:
    """Return what identifies an object: its URL, and its version if the store has one."""
    return f"{reference} {version}" if version else reference


def read_version(info: Mapping[str, Any]) -> str | None:
    """Return the ETag in `fs.info` or a listing of an object; it changes with its content."""
    etag = info.get("ETag") or info.get("etag")
    return str(etag).strip('"') if etag else None


def read_content(reference: str, *, fit: bool) -> bytes:
    """Read a local file or an object, within the size limit."""
    fs, path = open_filesystem(reference)
    check_size(int(_get_file_info(fs, path)["size"]), fit=fit)
    data: bytes = fs.cat_file(path, start=0, end=MAX_SHRINKABLE_BYTES + 1)
    return data


def _get_file_info(fs: Any, path: str) -> dict[str, Any]:
    info: dict[str, Any] = fs.info(path)
    if info["type"] != "file":
        raise ReferenceImageError(
            "is a folder" if info["type"] == "directory" else "is not a file"
        )
    return info


@contextmanager
def wrap_reference_errors(reference: str) -> Iterator[None]:
    """Convert all other errors to a ReferenceImageError that names the reference."""
    name = f"image {redact_url(reference)[:_MAX_SHOWN_CHARACTERS]!r}"
    try:
        yield
    except ReferenceImageError as error:
        raise ReferenceImageError(f"{name} {error.message}") from None
    except FluxKontextError:
        raise
    except FileNotFoundError:
        raise ReferenceImageError(f"{name} does not exist") from None
    except PermissionError:
        raise ReferenceImageError(f"{name} cannot be read: permission denied") from None
    except ImportError as error:
        raise ReferenceImageError(f"{name} needs a package: {error}") from None
    except Exception as error:  # noqa: BLE001 - each filesystem has errors of its own
        reason = f"{type(error).__name__}: {error}".rstrip(": ")
        raise ReferenceImageError(f"{name} cannot be read: {reason:.200}") from None


def url_identity(url: str) -> str:
    """Strip signature, password and fragment from a URL, so that it grants no access.

    Other references are returned unchanged: there, `#`, `?` and `@` have no such meaning.
    """
    plain = PLAIN_URL.fullmatch(url)
    if (plain and plain[2] is None) or not url.lower().startswith(("http:", "https:")):
        return url
    parts = urlsplit(url)
    query = parse_qsl(parts.query, keep_blank_values=True, errors="surrogateescape")
    names = {name.lower() for name, _ in query}
    patterns = [
        _SIGNATURE_PARAMETERS,
        *(pattern for name, pattern in _PARAMETERS_BESIDE.items() if name in names),
    ]
    kept = [
        (name, value)
        for name, value in query
        if not any(pattern.fullmatch(name.lower()) for pattern in patterns)
    ]
    host = parts.netloc.rpartition("@")[2]
    query_string = urlencode(kept, errors="surrogateescape")
    return urlunsplit((parts.scheme, host, parts.path, query_string, ""))
