"""Private temporary databases for data that does not fit into memory."""

from __future__ import annotations

import hashlib
import sqlite3
import sys
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# Memory for the database's pages. With random access, the pages of a million rows fit.
_CACHE_KIB = 16_384


def open_temp_database(table: str, cache_kib: int = _CACHE_KIB) -> sqlite3.Connection:
    """Open a database in a temporary file with a table, and begin a transaction.

    SQLite deletes the file on close. At most `cache_kib` KiB are held in memory.
    """
    # One thread at a time uses it, but not always the same one.
    database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
    database.execute(f"PRAGMA cache_size = -{cache_kib}")
    database.execute("PRAGMA journal_mode = OFF")
    database.execute("PRAGMA synchronous = OFF")
    database.execute(table)
    database.execute("BEGIN")
    return database


class TempDatabase:
    """Base class of context managers with a private temporary database."""

    def __init__(self, table: str, cache_kib: int = _CACHE_KIB) -> None:
        self._database = open_temp_database(table, cache_kib)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._database.close()


class DuplicateIndex(TempDatabase):
    """Index that remembers for each name the number it was first added with.

    SQLite keeps it in a temporary file, which closing deletes. Names are stored as 8 bytes of
    their hash: among a million names, the chance of a collision is 1 in 30 million.
    """

    def __init__(self) -> None:
        super().__init__("CREATE TABLE seen (name INTEGER PRIMARY KEY, number INTEGER)")

    def add_all(self, names: Iterable[str], numbers: Sequence[int]) -> Sequence[int]:
        """Add at most 250 names, and return the numbers they were first added with.

        These are the given numbers themselves if all names are new.
        """
        if not numbers:
            return numbers
        values = [0] * (2 * len(numbers))
        values[::2] = hashes = list(map(_hash, names))
        values[1::2] = numbers
        places = ", ".join(["(?, ?)"] * len(numbers))
        added = self._database.execute(
            f"INSERT INTO seen VALUES {places} ON CONFLICT DO NOTHING",  # noqa: S608
            values,
        )
        if added.rowcount == len(numbers):
            return numbers
        found = "SELECT number FROM seen WHERE name = ?"
        return [self._database.execute(found, (each,)).fetchone()[0] for each in hashes]


def _hash(name: str) -> int:
    # Python's own hash takes a tenth of the time, where it is long enough.
    return hash(name) if sys.hash_info.width == 64 else hash_name(name.encode())  # noqa: PLR2004


def hash_name(name: bytes) -> int:
    """Return 8 bytes of a name's hash, as SQLite stores integers."""
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), signed=True)
