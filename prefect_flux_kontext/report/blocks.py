"""Many things, a few at a time."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

T = TypeVar("T")


def blocks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of so many items, the last of as many as are left."""
    rest = iter(items)
    return iter(lambda: list(itertools.islice(rest, size)), [])
