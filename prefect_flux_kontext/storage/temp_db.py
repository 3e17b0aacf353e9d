"""A private database for what would not fit into memory, gone when it is closed."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType

_CACHE_KIB = 16_384
"""Memory for the database's pages: where rows are looked up at random, a million fit into it."""


def open_temp_database(table: str, cache_kib: int = _CACHE_KIB) -> sqlite3.Connection:
    """Open a database that SQLite keeps in a temporary file, inside a transaction.

    Args:
        table: The statement that creates its table.
        cache_kib: The most KiB of it that are held in memory.
    """
    # Used by one thread at a time, though not always by the same one.
    database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
    database.execute(f"PRAGMA cache_size = -{cache_kib}")
    database.execute("PRAGMA journal_mode = OFF")
    database.execute("PRAGMA synchronous = OFF")
    database.execute(table)
    database.execute("BEGIN")
    return database


class TempDatabase:
    """Has a private database while the block runs.

    Args:
        table: The statement that creates its table.
        cache_kib: The most KiB of it that are held in memory.
    """

    def __init__(self, table: str, cache_kib: int = _CACHE_KIB) -> None:
        self._database = open_temp_database(table, cache_kib)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._database.close()
