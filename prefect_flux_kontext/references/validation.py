"""Check by its bytes, before anything is paid, that the service accepts a reference image."""

from __future__ import annotations

import math
import re
import threading

from prefect_flux_kontext.errors import InvalidImageError, ReferenceImageError
from prefect_flux_kontext.images.decode import MAX_PIXELS, inspect_image
from prefect_flux_kontext.images.headers import find_slow_structure, read_size
from prefect_flux_kontext.references.resizing import check_can_shrink

MAX_REFERENCE_BYTES = 10_000_000
"""Limit of the service. Its page says 10 MB; this is the strictest reading of that."""

MAX_SHRINKABLE_BYTES = 100_000_000
"""Largest file that is read in order to shrink it."""

# Bounds memory: an image of 64 million pixels takes 200 MB while it is decoded.
_DECODE_SLOTS = threading.BoundedSemaphore(2)

_UNSUPPORTED_FORMATS = (
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
# Enough to recognize each of the formats above.
_HEAD_BYTES = 1_000


def check_size(size: int, *, fit: bool) -> None:
    """Check the size of a file, in bytes, before it is read."""
    if not size:
        raise ReferenceImageError("is an empty file")
    if size > MAX_REFERENCE_BYTES and not fit:
        raise ReferenceImageError(
            f"has {_format_megabytes(size)}; the service takes 10 MB; shrink it, or use "
            "--fit-references (in a flow, fit_references)"
        )
    if size > MAX_SHRINKABLE_BYTES:
        raise ReferenceImageError(
            f"has {_format_megabytes(size)}; at most 100 MB are read to be shrunk"
        )


def check_image(data: bytes, *, fit: bool) -> None:
    """Check an image by decoding it, unless it has too many pixels and will be shrunk to `fit`."""
    check_size(len(data), fit=fit)
    width, height = read_size(data) or (0, 0)
    with _DECODE_SLOTS:
        if width * height > MAX_PIXELS:
            problem = f"has {width:,} x {height:,} pixels, more than {MAX_PIXELS:,}"
            if not fit:
                raise ReferenceImageError(f"{problem}; shrink it")
            check_can_shrink(data, problem)
            return
        if slow := find_slow_structure(data):
            raise ReferenceImageError(f"would take long to decode: {slow}; encode it again")
        try:
            inspect_image(data)
        except InvalidImageError as error:
            raise ReferenceImageError(_describe_problem(data, error)) from None


def needs_shrinking(data: bytes) -> bool:
    """Return whether an image that passed `check_image` must be shrunk."""
    width, height = read_size(data) or (0, 0)
    return len(data) > MAX_REFERENCE_BYTES or width * height > MAX_PIXELS


def _describe_problem(data: bytes, error: InvalidImageError) -> str:
    head = data[:_HEAD_BYTES]
    for pattern, kind in _UNSUPPORTED_FORMATS:
        if pattern.match(head):
            return f"is {kind} by its content; the service takes JPG, PNG and WebP"
    if read_size(data):
        return f"is cut off or damaged: {error.message.partition('; they start')[0].rstrip('.')}"
    kind = "text" if head.isascii() and b"\0" not in head else "not an image"
    return f"is {kind} by its content; the service takes JPG, PNG and WebP"


def _format_megabytes(size: int) -> str:
    # Rounded up, so that a file one byte over the limit does not read "10.0 MB".
    return f"{math.ceil(size / 100_000) / 10:.1f} MB"
