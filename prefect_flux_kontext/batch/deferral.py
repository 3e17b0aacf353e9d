"""Rows that are submitted now and whose results are left for a later collection."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from prefect_flux_kontext.errors import FluxKontextError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from prefect_flux_kontext.manifest.row import RefusedRow, Row

PENDING_COLLECTION = "PENDING_COLLECTION"
"""The reason of a row that was submitted without waiting for its result."""


class Deferral:
    """Lets rows wait for their results only until every row is submitted.

    An account has a limited number of slots. While there are more rows than slots, the rest can
    only be submitted as tasks end, so until then results are waited for and stored as usual.

    Args:
        on: Whether results are left for a later collection; else each row waits for its own.
    """

    def __init__(self, *, on: bool) -> None:
        self._on = on
        self._to_submit: set[int] = set()
        self._all_read = False
        self._waiting: set[asyncio.Timeout] = set()

    def expect(self, rows: Iterable[Row | RefusedRow]) -> None:
        """Register rows that are about to be run."""
        self._to_submit.update(map(id, rows))

    def mark_submitted(self, row: Row | RefusedRow) -> None:
        """Note that a row is accepted, or needs no slot."""
        self._to_submit.discard(id(row))
        self._end_waits()

    def mark_all_read(self) -> None:
        """Note that no further row will be registered."""
        self._all_read = True
        self._end_waits()

    @asynccontextmanager
    async def limit_wait(self, row: Row) -> AsyncIterator[None]:
        """End the block, which waits for an accepted row's result, once all is submitted.

        Raises:
            FluxKontextError: The result is left for a later collection.
        """
        self.mark_submitted(row)
        try:
            async with asyncio.timeout(None) as wait:
                self._waiting.add(wait)
                self._end_waits()
                try:
                    yield
                finally:
                    self._waiting.discard(wait)
        except TimeoutError:
            raise FluxKontextError(
                "Submitted and paid; result pending collection.",
                code=PENDING_COLLECTION,
            ) from None

    @property
    def _is_over(self) -> bool:
        return self._on and self._all_read and not self._to_submit

    def _end_waits(self) -> None:
        if self._is_over:
            for wait in self._waiting:
                wait.reschedule(0)
            self._waiting.clear()
