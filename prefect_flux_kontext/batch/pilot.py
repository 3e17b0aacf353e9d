"""The pilot of a batch: a fair sample of the rows to be paid for, which runs first."""

from __future__ import annotations

import hashlib
import heapq
import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from prefect_flux_kontext.manifest.row import RefusedRow, Row


class PilotSample:
    """A sample of rows with equal shares of all styles, drawn while the rows are read.

    It depends on the rows alone and not on their order, so a plan draws the same sample again.

    Args:
        size: Rows to draw at most.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._styles: dict[str | None, list[tuple[int, str]]] = {}

    def add(self, row: Row) -> None:
        """Consider a row."""
        if not self._size:
            return
        digest = hashlib.blake2b(row.name.encode(), digest_size=8).digest()
        drawn = self._styles.setdefault(row.style, [])
        heapq.heappush(drawn, (-int.from_bytes(digest), row.name))
        if len(drawn) > self._size:
            heapq.heappop(drawn)

    def names(self) -> frozenset[str]:
        """Return the output names of the sample: one row of each style in turn."""
        by_style = [
            sorted(self._styles[style], reverse=True)
            for style in sorted(self._styles, key=lambda style: style or "")
        ]
        turns = itertools.chain.from_iterable(itertools.zip_longest(*by_style))
        return frozenset(drawn[1] for drawn in itertools.islice(filter(None, turns), self._size))


def select_rows(
    rows: Iterable[Row | RefusedRow], names: frozenset[str]
) -> Iterator[Row | RefusedRow]:
    """Yield the rows with these output names."""
    return (row for row in rows if getattr(row, "name", None) in names)
