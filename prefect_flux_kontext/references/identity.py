"""What a reference that is not on the web is, so that changed content is another row."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from prefect_flux_kontext.errors import FluxKontextError, ReferenceImageError
from prefect_flux_kontext.references.checks import LARGEST_TO_FIT, check_size
from prefect_flux_kontext.references.kinds import Kind, kind_of, opened

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_CHUNK = 2**20
_SHOWN = 200


def identity_of(reference: str) -> str:
    """What its content is known by: a checksum, or what its store says of it.

    Args:
        reference: A local file, or an object in a bucket.

    Raises:
        ReferenceImageError: It is no file, or a hopelessly large one.
        Exception: What the filesystem raises.
    """
    fs, path = opened(reference)
    info = _info_of_file(fs, path)
    if kind_of(reference) is Kind.PRIVATE:
        return private_identity(reference, version_of(info))
    check_size(int(info["size"]), fit=True)
    digest = hashlib.sha256()
    with fs.open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"


def private_identity(reference: str, version: str | None) -> str:
    """What an object is known by: its URL, and its version where the store has one."""
    return f"{reference} {version}" if version else reference


def version_of(info: Mapping[str, Any]) -> str | None:
    """What a store says of an object that changes with its content.

    Args:
        info: From `fs.info` or a listing.
    """
    told = info.get("ETag") or info.get("etag")
    return str(told).strip('"') if told else None


def content_of(reference: str, *, fit: bool) -> bytes:
    """The bytes of a local file or an object, if they are not too many.

    Raises:
        ReferenceImageError: It is no file, or too large.
        Exception: What the filesystem raises.
    """
    fs, path = opened(reference)
    check_size(int(_info_of_file(fs, path)["size"]), fit=fit)
    data: bytes = fs.cat_file(path, start=0, end=LARGEST_TO_FIT + 1)
    return data


def _info_of_file(fs: Any, path: str) -> dict[str, Any]:
    info: dict[str, Any] = fs.info(path)
    if info["type"] != "file":
        raise ReferenceImageError("is a folder" if info["type"] == "directory" else "is no file")
    return info


@contextmanager
def told_of(reference: str) -> Iterator[None]:
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
