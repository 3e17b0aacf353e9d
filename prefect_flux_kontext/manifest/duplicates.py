"""What was seen before, for as many things as there may be: on disk, with little held."""

from __future__ import annotations

import hashlib
from contextlib import closing

from prefect_flux_kontext.storage.temp_db import TempDatabase


class DuplicateIndex(TempDatabase):
    """Remembers for each name the number that it came with first.

    A private database that SQLite keeps in a temporary file, and that is gone when closed. Names
    are kept as 8 bytes of their hash: among a million, two are taken for one another with a
    chance of 1 in 30 million.
    """

    def __init__(self) -> None:
        super().__init__("CREATE TABLE seen (name INTEGER PRIMARY KEY, number INTEGER)")

    def first(self, name: bytes, number: int) -> int:
        """The number that the name came with first, which is this one where it is new."""
        digest = hashlib.blake2b(name, digest_size=8).digest()
        short = int.from_bytes(digest, signed=True)
        added = self._database.execute(
            "INSERT INTO seen VALUES (?, ?) ON CONFLICT DO NOTHING", (short, number)
        )
        if added.rowcount:
            return number
        with closing(
            self._database.execute("SELECT number FROM seen WHERE name = ?", (short,))
        ) as found:
            return int(found.fetchone()[0])
