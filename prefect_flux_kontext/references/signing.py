"""Signed URLs: whoever holds one reads the object, so it is made when it is sent and not kept."""

from __future__ import annotations

import math
from typing import Any

from prefect_flux_kontext.errors import ReferenceImageError

_SHORTEST = 3_600
_LONGEST = 7 * 24 * 3_600
"""Seconds; S3 signs for no longer than a week."""


def life_of_signatures(timeout: float) -> int:
    """Seconds for which a signed URL is good: longer than the service queues and works.

    Args:
        timeout: Seconds after which the wait for a task is given up.
    """
    return min(max(_SHORTEST, math.ceil(2 * timeout)), _LONGEST)


def signed(fs: Any, path: str, seconds: int) -> str:
    """A URL under which anybody can read the object for so long.

    Raises:
        ReferenceImageError: The filesystem cannot sign, or may not.
    """
    try:
        url = str(fs.sign(path, expiration=seconds))
    except Exception as error:  # noqa: BLE001 - each filesystem has errors of its own
        # Not its text: who knows how much of a signature is in it.
        raise ReferenceImageError(
            f"{path} cannot be signed ({type(error).__name__}); check that the credentials in use "
            "can sign, and may read it. Nothing was submitted for its row."
        ) from None
    if not url.startswith(("https://", "http://")):
        raise ReferenceImageError(f"{path} was signed as something that is no URL.")
    return url
