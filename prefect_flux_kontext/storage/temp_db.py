"""A private temporary database for data that does not fit into memory."""

from __future__ import annotations

import sqlite3
from typing import Self

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
