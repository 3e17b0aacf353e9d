"""Detection of duplicate names among any number of rows, on disk and with little memory."""

from __future__ import annotations

import hashlib
from contextlib import closing

from prefect_flux_kontext.storage.temp_db import TempDatabase


class DuplicateIndex(TempDatabase):
    """Index that remembers for each name the number it was first added with.

    SQLite keeps it in a temporary file, which closing deletes. Names are stored as 8 bytes of
    their hash: among a million names, the chance of a collision is 1 in 30 million.
    """

    def __init__(self) -> None:
        super().__init__("CREATE TABLE seen (name INTEGER PRIMARY KEY, number INTEGER)")

    def add(self, name: bytes, number: int) -> int:
        """Add a name and return the number it was first added with: `number` for a new name."""
        digest = hashlib.blake2b(name, digest_size=8).digest()
        name_hash = int.from_bytes(digest, signed=True)
        added = self._database.execute(
            "INSERT INTO seen VALUES (?, ?) ON CONFLICT DO NOTHING", (name_hash, number)
        )
        if added.rowcount:
            return number
        with closing(
            self._database.execute("SELECT number FROM seen WHERE name = ?", (name_hash,))
        ) as rows:
            return int(rows.fetchone()[0])
