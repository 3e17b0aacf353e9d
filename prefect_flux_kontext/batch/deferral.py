"""Submitting now and storing later: rows wait for their results only while others need slots."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from prefect_flux_kontext.errors import FluxKontextError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from prefect_flux_kontext.manifest.rows import RefusedRow, Row

LEFT = "LEFT_TO_COLLECT"
"""Why a row that was submitted is outstanding: it was meant to be."""


class Deferral:
    """Lets rows wait for their results until nothing is left to submit, and no longer.

    An account has so many slots. While there are more rows than that, the rest can only be
    submitted as tasks end, so until then results are waited for and stored as ever.

    Args:
        on: Whether rows are left to be collected at all; else each waits to its end.
    """

    def __init__(self, *, on: bool) -> None:
        self._on = on
        self._to_submit: set[int] = set()
        self._all_read = False
        self._waiting: set[asyncio.Timeout] = set()

    def expect(self, rows: Iterable[Row | RefusedRow]) -> None:
        """Say which rows are about to be run."""
        self._to_submit.update(map(id, rows))

    def submitted(self, row: Row | RefusedRow) -> None:
        """Say that a row is accepted, or needs no slot."""
        self._to_submit.discard(id(row))
        self._end_waits()

    def all_read(self) -> None:
        """Say that no further row will come."""
        self._all_read = True
        self._end_waits()

    @asynccontextmanager
    async def waiting(self, row: Row) -> AsyncIterator[None]:
        """Wait for an accepted row's result inside, for as long as it is to be waited for.

        Raises:
            FluxKontextError: It is left to be collected.
        """
        self.submitted(row)
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
                "It is submitted and paid for; its result is left to be collected.", code=LEFT
            ) from None

    @property
    def _over(self) -> bool:
        return self._on and self._all_read and not self._to_submit

    def _end_waits(self) -> None:
        if self._over:
            for wait in self._waiting:
                wait.reschedule(0)
            self._waiting.clear()
