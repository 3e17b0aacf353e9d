"""Would the service take this file? Judged by its bytes, before anything is paid."""

from __future__ import annotations

import math
import re
import threading

from prefect_flux_kontext.errors import InvalidImageError, ReferenceImageError
from prefect_flux_kontext.images.decode import MAX_PIXELS, inspect_image
from prefect_flux_kontext.images.headers import read_size
from prefect_flux_kontext.references.resizing import check_can_shrink

MAX_REFERENCE_BYTES = 10_000_000
"""Bytes that the service takes: its page says 10 MB, and whoever counts in 2**20 takes more."""

MAX_SHRINKABLE_BYTES = 100_000_000
"""Bytes of a file that is still read, to be shrunk."""

_AT_ONCE = threading.BoundedSemaphore(2)
"""A picture of 64 million pixels takes 200 MB while it is decoded."""

_OTHERS = (
    (re.compile(rb"GIF8[79]a"), "a GIF"),
    (re.compile(rb"\s*(?:<[?!].*)?<svg", re.DOTALL), "an SVG"),
    (re.compile(rb"\s*<(?:!doctype html|html|head|body)", re.IGNORECASE), "a page of HTML"),
    (re.compile(rb"\s*<\?xml"), "XML"),
    (re.compile(rb"BM"), "a BMP"),
    (re.compile(rb"II\*\0|MM\0\*"), "a TIFF"),
    (re.compile(rb"%PDF"), "a PDF"),
    (re.compile(rb"....ftyp(?:hei|hev|mif|msf)", re.DOTALL), "a HEIC"),
    (re.compile(rb"....ftypavi", re.DOTALL), "an AVIF"),
)
_HEAD = 1_000


def check_size(size: int, *, fit: bool) -> None:
    """Whether a file is worth reading, by its bytes.

    Raises:
        ReferenceImageError: It is empty, or too large.
    """
    if not size:
        raise ReferenceImageError("is an empty file")
    if size > MAX_REFERENCE_BYTES and not fit:
        raise ReferenceImageError(
            f"has {_megabytes(size)}; the service takes 10 MB; shrink it, or use "
            "--fit-references (in a flow, fit_references)"
        )
    if size > MAX_SHRINKABLE_BYTES:
        raise ReferenceImageError(f"has {_megabytes(size)}; at most 100 MB are read to be shrunk")


def check_image(data: bytes, *, fit: bool) -> None:
    """Decode the whole image, unless its header promises too much.

    Args:
        data: The bytes of the file.
        fit: Whether it is shrunk where it is too large.

    Raises:
        ReferenceImageError: It is no JPG, PNG or WebP that the service takes; it says what it
            is.
    """
    check_size(len(data), fit=fit)
    width, height = read_size(data) or (0, 0)
    with _AT_ONCE:
        if width * height > MAX_PIXELS:
            told = f"has {width:,} x {height:,} pixels, more than {MAX_PIXELS:,}"
            if not fit:
                raise ReferenceImageError(f"{told}; shrink it")
            check_can_shrink(data, told)
            return
        try:
            inspect_image(data)
        except InvalidImageError as error:
            raise ReferenceImageError(_what_is_wrong(data, error)) from None


def needs_shrinking(data: bytes) -> bool:
    """Whether an image that `check_image` lets pass is too large as it is."""
    width, height = read_size(data) or (0, 0)
    return len(data) > MAX_REFERENCE_BYTES or width * height > MAX_PIXELS


def _what_is_wrong(data: bytes, error: InvalidImageError) -> str:
    head = data[:_HEAD]
    for sign, kind in _OTHERS:
        if sign.match(head):
            return f"is {kind} by its content; the service takes JPG, PNG and WebP"
    if read_size(data):
        return f"is cut off or damaged: {error.message.partition('; they start')[0].rstrip('.')}"
    kind = "text" if head.isascii() and b"\0" not in head else "no image"
    return f"is {kind} by its content; the service takes JPG, PNG and WebP"


def _megabytes(size: int) -> str:
    # Rounded up, so that what is too large by a byte does not seem to be just right.
    return f"{math.ceil(size / 100_000) / 10:.1f} MB"
