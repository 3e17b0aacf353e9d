"""What the rows of a manifest may name: rights follow the origin of the rows.

A manifest on this machine, or rows given directly, come from somebody who can read this machine. A
manifest from elsewhere must not read files of this machine, nor buckets that happen to be readable
with this process's credentials.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from typing import Any, NamedTuple

from prefect_flux_kontext.redaction import redact_url
from prefect_flux_kontext.references.location import (
    LocationKind,
    classify_location,
    find_manifest_folder,
    normalize_reference,
    parse_protocol,
)
from prefect_flux_kontext.settings import FluxKontextSettings

_MAX_SHOWN_CHARACTERS = 100
_ALIASES = {"s3a": "s3", "gcs": "gs", "abfss": "abfs", "az": "abfs"}
_HINT = "to allow it, name its folder or bucket in FLUX_KONTEXT_REFERENCE_ROOTS"


class Rights(NamedTuple):
    """Which references that are not on the web the rows of a manifest may name."""

    folder: str | None = None  # of relative paths; None if it may name no files of this machine
    roots: tuple[str, ...] | None = None  # folders and prefixes to be below; None for all
    known: frozenset[str] = frozenset()  # allowed although the other rules do not allow them


def find_rights(source: Any, image_folder: str | None = None) -> Rights:
    """Return the rights of the rows of a manifest.

    Without FLUX_KONTEXT_REFERENCE_ROOTS, a folder of images has what is below it, a local manifest
    everything, and a remote manifest its own bucket.
    """
    folder = find_manifest_folder(source)
    roots = _read_roots()
    if roots is None and folder is None:
        roots = (_find_bucket(source),) if _is_bucket(source) else ()
    elif roots is None and image_folder is not None:
        roots = (_normalize_place(image_folder),)
    return Rights(folder, roots)


def find_retry_rights(output: str, known: Iterable[str]) -> Rights:
    """Return the rights of the failed rows of an output: those of a remote manifest.

    The ledger records the `known` references as allowed for these rows.
    """
    roots = _read_roots()
    if roots is not None:
        return Rights(
            None,
            roots,
            frozenset(each for each in known if _is_below(_normalize_place(each), roots)),
        )
    return Rights(None, (_find_bucket(output),) if _is_bucket(output) else (), frozenset(known))


def find_rights_problem(reference: str, rights: Rights) -> str | None:
    """Return why the rows of a manifest may not name a reference, or None if they may."""
    kind = classify_location(reference)
    if kind not in (LocationKind.LOCAL, LocationKind.PRIVATE) or reference in rights.known:
        return None
    shown = f"image {redact_url(reference)[:_MAX_SHOWN_CHARACTERS]!r}"
    if kind is LocationKind.LOCAL and rights.folder is None:
        return (
            f"{shown} is a local file, and the manifest is not: only a manifest on this "
            "machine, or rows given directly, may name local files"
        )
    if rights.roots is None:
        return None
    with contextlib.suppress(ValueError):  # a path that no filesystem takes
        place = _normalize_place(normalize_reference(reference, rights.folder))
        if _is_below(place, rights.roots):
            return None
    return f"{shown} is outside of what this manifest may name; {_HINT}"


def _read_roots() -> tuple[str, ...] | None:
    roots = FluxKontextSettings().reference_roots
    return None if roots is None else tuple(map(_normalize_place, roots))


def _is_bucket(url: str) -> bool:
    return classify_location(url) is LocationKind.PRIVATE


def _find_bucket(url: str) -> str:
    protocol, _, rest = _normalize_place(url).partition("://")
    return f"{protocol}://{rest.partition('/')[0]}"


def _normalize_place(place: str) -> str:
    """Return the real path of a folder or file of this machine, or a URL with a plain protocol."""
    protocol = parse_protocol(place)
    if protocol in ("", "file", "local"):
        return os.path.realpath(normalize_reference(place, "")).rstrip("/")
    return (_ALIASES.get(protocol, protocol) + place[len(protocol) :]).rstrip("/")


def _is_below(place: str, roots: tuple[str, ...]) -> bool:
    # Some stores resolve `..` in the URLs of objects; real paths have none.
    return ".." not in place.split("/") and any(
        place == root or place.startswith(f"{root}/") for root in roots
    )
