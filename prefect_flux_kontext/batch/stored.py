"""What earlier runs have stored: the whole record by row key, with little held in memory."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

from prefect_flux_kontext.ledger.checkpoints import FinishedRow, finished_rows
from prefect_flux_kontext.scratch import Scratch

if TYPE_CHECKING:
    from collections.abc import Collection

    from prefect_flux_kontext.ledger.store import RecordStore

_BLOCK = 1_000


class StoredRows(Scratch):
    """The stored rows of a ledger, in a private database in a temporary file."""

    def __init__(self) -> None:
        super().__init__("CREATE TABLE rows (key BLOB PRIMARY KEY, record TEXT) WITHOUT ROWID")
        self._one_at_a_time = threading.Lock()

    async def read(self, store: RecordStore) -> None:
        """Read a ledger's parts.

        A failed row may have gone on in a later attempt, so only what is stored is taken as read.

        Raises:
            LedgerError: The ledger cannot be read or is damaged.
        """
        block = []
        async for row in finished_rows(store):
            if row.ended.state == "stored":
                block.append((bytes.fromhex(row.key), row.model_dump_json(exclude_none=True)))
            if len(block) >= _BLOCK:
                await asyncio.to_thread(self._add, block)
                block = []
        await asyncio.to_thread(self._add, block)

    async def of(self, keys: Collection[str]) -> dict[str, FinishedRow]:
        """Those of the rows that are stored, by row key."""
        return await asyncio.to_thread(self._find, keys)

    def _add(self, block: list[tuple[bytes, str]]) -> None:
        self._database.executemany("INSERT OR REPLACE INTO rows VALUES (?, ?)", block)

    def _find(self, keys: Collection[str]) -> dict[str, FinishedRow]:
        found = {}
        with self._one_at_a_time:
            for key in keys:
                [record] = self._database.execute(
                    "SELECT record FROM rows WHERE key = ?", (bytes.fromhex(key),)
                ).fetchone() or [None]
                if record is not None:
                    found[key] = FinishedRow.model_validate_json(record)
        return found
