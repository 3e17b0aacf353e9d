"""What a reference that is not on the web is, so that changed content is another row."""

from __future__ import annotations

import hashlib
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from prefect_flux_kontext.errors import FluxKontextError, ReferenceImageError
from prefect_flux_kontext.references.location import Kind, classify_location, open_filesystem
from prefect_flux_kontext.references.validation import MAX_SHRINKABLE_BYTES, check_size

if TYPE_CHECKING:
    from collections.abc import Mapping


if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_CHUNK = 2**20
_SHOWN = 200


def identify_reference(reference: str) -> str:
    """What its content is known by: a checksum, or what its store says of it.

    Args:
        reference: A local file, or an object in a bucket.

    Raises:
        ReferenceImageError: It is no file, or a hopelessly large one.
        Exception: What the filesystem raises.
    """
    fs, path = open_filesystem(reference)
    info = _info_of_file(fs, path)
    if classify_location(reference) is Kind.PRIVATE:
        return identify_private_object(reference, read_version(info))
    check_size(int(info["size"]), fit=True)
    digest = hashlib.sha256()
    with fs.open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"


def identify_private_object(reference: str, version: str | None) -> str:
    """What an object is known by: its URL, and its version where the store has one."""
    return f"{reference} {version}" if version else reference


def read_version(info: Mapping[str, Any]) -> str | None:
    """What a store says of an object that changes with its content.

    Args:
        info: From `fs.info` or a listing.
    """
    told = info.get("ETag") or info.get("etag")
    return str(told).strip('"') if told else None


def hash_content(reference: str, *, fit: bool) -> bytes:
    """The bytes of a local file or an object, if they are not too many.

    Raises:
        ReferenceImageError: It is no file, or too large.
        Exception: What the filesystem raises.
    """
    fs, path = open_filesystem(reference)
    check_size(int(_info_of_file(fs, path)["size"]), fit=fit)
    data: bytes = fs.cat_file(path, start=0, end=MAX_SHRINKABLE_BYTES + 1)
    return data


def _info_of_file(fs: Any, path: str) -> dict[str, Any]:
    info: dict[str, Any] = fs.info(path)
    if info["type"] != "file":
        raise ReferenceImageError("is a folder" if info["type"] == "directory" else "is no file")
    return info


@contextmanager
def describe_reference(reference: str) -> Iterator[None]:
    """Turn whatever a filesystem or a check raises into an error that names the reference.

    Raises:
        ReferenceImageError: Instead of every other error.
    """
    name = f"image {reference[:_SHOWN]!r}"
    try:
        yield
    except ReferenceImageError as error:
        raise ReferenceImageError(f"{name} {error.message}") from None
    except FluxKontextError:
        raise
    except FileNotFoundError:
        raise ReferenceImageError(f"{name} is not there") from None
    except PermissionError:
        raise ReferenceImageError(f"{name} may not be read: permission denied") from None
    except ImportError as error:
        raise ReferenceImageError(f"{name} needs a package: {error}") from None
    except Exception as error:  # noqa: BLE001 - each filesystem has errors of its own
        told = f"{type(error).__name__}: {error}".rstrip(": ")
        raise ReferenceImageError(f"{name} cannot be read: {told:.200}") from None


# What signs a URL says who may read it and for how long, not what is there. The plain names are
# anybody's, and may well say what is there, unless the signature that they belong to is there too.
_ALWAYS = re.compile(r"x-(amz|goog)-.*")  # AWS and Google Cloud


_BESIDE = {
    # AWS, Google Cloud and CloudFront
    "signature": re.compile(
        r"signature|expires|awsaccesskeyid|googleaccessid|key-pair-id|policy|hash-algorithm"
    ),
    # Azure shared access signatures
    "sig": re.compile(r"sig|se|sp|sv|sr|ss|st|sip|spr|srt|sdd|skoid|sktid|skt|ske|sks|skv"),
}


def url_identity(url: str) -> str:
    """A URL without its signature, password and fragment: it gives nobody access.

    What is not on the web stays as it is: there, neither `#` nor `?` nor `@` has that meaning.
    """
    if not url.lower().startswith(("http:", "https:")):
        return url
    parts = urlsplit(url)
    query = parse_qsl(parts.query, keep_blank_values=True, errors="surrogateescape")
    names = {name.lower() for name, _ in query}
    signs = [_ALWAYS, *(beside for name, beside in _BESIDE.items() if name in names)]
    kept = [
        (name, value)
        for name, value in query
        if not any(sign.fullmatch(name.lower()) for sign in signs)
    ]
    host = parts.netloc.rpartition("@")[2]
    told = urlencode(kept, errors="surrogateescape")
    return urlunsplit((parts.scheme, host, parts.path, told, ""))
