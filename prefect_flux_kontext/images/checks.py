"""Checks of result images: flags for what is likely wrong. A flag changes and pays nothing."""

from __future__ import annotations

import importlib
import logging
import threading
from collections import defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from PIL import Image

from prefect_flux_kontext.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    Check: TypeAlias = "Callable[[Image.Image, Mapping[str, Any]], Iterable[str]]"
    """A user's own check: takes the decoded image and its row, returns flags."""

logger = logging.getLogger(__name__)

_SAMPLE_PIXELS = 64
_GRID = 16

# Levels of 255. Compression and a resize change the mean of a cell by less.
_MAX_BLANK_RANGE = 10
_MAX_MEAN_DIFFERENCE = 3.0
_MAX_CELL_DIFFERENCE = 24
_MAX_HASH_BITS = 6

# Padding is an even band on two opposite sides, of at least this share, with a straight edge.
_MIN_BAND_SHARE = 0.03
_MAX_BAND_RANGE = 6
_EDGE_DIFFERENCE = 20
_MIN_EDGE_SHARE = 0.7

_MAX_RATIO_DIFFERENCE = 0.04

# Fingerprints take 1 kB each.
_MAX_FINGERPRINTS = 10_000


class Fingerprint(NamedTuple):
    """What an image looks like: where it gets darker, and the mean colours of 16 x 16 cells."""

    bits: int
    cells: bytes


def take_fingerprint(image: Image.Image) -> Fingerprint:
    """Return the fingerprint of a decoded image; equal sizes are not needed."""
    small = _take_sample(image)
    grey = small.convert("L").resize((9, 8), Image.Resampling.BOX).tobytes()
    bits = 0
    for at in range(72):
        if at % 9 < 8:  # noqa: PLR2004 - the last column has no neighbour
            bits = bits << 1 | (grey[at] > grey[at + 1])
    return Fingerprint(bits, small.resize((_GRID, _GRID), Image.Resampling.BOX).tobytes())


def is_nearly_same(one: Fingerprint, other: Fingerprint) -> bool:
    """Whether two images look the same, apart from compression and size."""
    if (one.bits ^ other.bits).bit_count() > _MAX_HASH_BITS:
        return False
    differences = [abs(a - b) for a, b in zip(one.cells, other.cells, strict=True)]
    return (
        sum(differences) / len(differences) <= _MAX_MEAN_DIFFERENCE
        and max(differences) <= _MAX_CELL_DIFFERENCE
    )


def is_blank(image: Image.Image) -> bool:
    """Whether an image has one colour."""
    extrema: Any = _take_sample(image).getextrema()
    return all(high - low <= _MAX_BLANK_RANGE for low, high in extrema)


def _take_sample(image: Image.Image) -> Image.Image:
    """Return 64 x 64 pixels of an image; of a sample, itself."""
    size = (_SAMPLE_PIXELS, _SAMPLE_PIXELS)
    return image.convert("RGB").resize(size, Image.Resampling.BOX, reducing_gap=1.0)


def is_padded(image: Image.Image) -> bool:
    """Whether an image has even bands of one colour on two opposite sides."""
    small = image.convert("L")
    small.thumbnail((256, 256), reducing_gap=1.0)
    for sample in (small, small.transpose(Image.Transpose.ROTATE_90)):
        width, height = sample.size
        flipped = sample.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        least = max(2, _MIN_BAND_SHARE * height)
        if (top := _measure_band(sample)) < least:
            continue
        bottom = _measure_band(flipped)
        if bottom < least or top + bottom > 0.9 * height:
            continue
        colours = {side.getpixel((width // 2, 0)) for side in (sample, flipped)}
        if max(colours) - min(colours) <= _MAX_BAND_RANGE:  # type: ignore[type-var,operator]
            return True
    return False


def _measure_band(image: Image.Image) -> int:
    """Return the height of a band of one colour at the top; 0 if it has no straight edge."""
    width, height = image.size
    colour: Any = image.getpixel((width // 2, 0))
    for top in range(height):
        line = image.crop((0, top, width, top + 1))
        low, high = line.getextrema()
        if max(high - colour, colour - low) > _MAX_BAND_RANGE:
            break
    if not top:
        return 0
    # A resize mixes the line at the edge, so the one behind it counts.
    pixels = image.crop((0, min(top + 1, height - 1), width, min(top + 2, height))).tobytes()
    different = sum(abs(pixel - colour) > _EDGE_DIFFERENCE for pixel in pixels)
    return top if different >= _MIN_EDGE_SHARE * width else 0


def load_checks(names: Sequence[str]) -> tuple[Check, ...]:
    """Import a user's own checks, each named as `module:function`.

    Raises:
        ConfigurationError: A check cannot be imported; the message lists all of them.
    """
    checks, problems = [], []
    for name in names:
        module, _, function = name.partition(":")
        try:
            check = getattr(importlib.import_module(module), function)
        except Exception as error:  # noqa: BLE001 - a module may raise anything
            problems.append(f"{name!r:.100} ({type(error).__name__}: {error})")
            continue
        if callable(check):
            checks.append(check)
        else:
            problems.append(f"{name!r:.100} is not a function")
    if problems:
        raise ConfigurationError(
            f"Checks cannot be imported: {'; '.join(problems)}. Give `module:function` of an "
            "installed module."
        )
    return tuple(checks)


class ResultChecks:
    """Flags result images, also by a user's own checks. Threads share it."""

    def __init__(self, own: Sequence[Check] = ()) -> None:
        self._own = own
        self._lock = threading.Lock()
        self._seen: defaultdict[tuple[int, int], list[Fingerprint]] = defaultdict(list)
        self._left = _MAX_FINGERPRINTS

    def find_flags(
        self,
        image: Image.Image,
        row: Mapping[str, Any],
        ratio: str,
        reference: Fingerprint | None,
    ) -> list[str]:
        """Return the flags of a decoded image; never raises.

        Own checks get its `row`. The `ratio` is the one that was asked for, such as `4:3`.
        """
        flags = []
        width, height = (int(side) for side in ratio.split(":"))
        asked = width / height
        if abs(image.width / image.height / asked - 1) > _MAX_RATIO_DIFFERENCE:
            flags.append("ratio")
        sample = _take_sample(image)
        if is_blank(sample):
            flags.append("blank")
        else:
            if is_padded(image):
                flags.append("border")
            fingerprint = take_fingerprint(sample)
            if reference is not None and is_nearly_same(reference, fingerprint):
                flags.append("unchanged")
            if self._was_seen(fingerprint):
                flags.append("repeated")
        for check in self._own:
            try:
                flags += [str(flag)[:60] for flag in check(image, row)]
            except Exception:
                logger.exception("The check %r failed for row %s.", check, row.get("id"))
                flags.append("check failed")
        return flags

    def _was_seen(self, fingerprint: Fingerprint) -> bool:
        # Of seven parts of the bits, one is equal if at most six bits differ.
        parts = [(at, fingerprint.bits >> at & 0x1FF) for at in range(0, 63, 9)]
        with self._lock:
            seen = [other for part in parts for other in self._seen[part]]
            if self._left > 0:
                self._left -= 1
                for part in parts:
                    self._seen[part].append(fingerprint)
        return any(is_nearly_same(other, fingerprint) for other in seen)
