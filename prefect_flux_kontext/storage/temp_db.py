"""A private temporary database for data that does not fit into memory."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType

# Memory for the database's pages. With random access, the pages of a million rows fit.
_CACHE_KIB = 16_384


def open_temp_database(table: str, cache_kib: int = _CACHE_KIB) -> sqlite3.Connection:
    """Open a database in a temporary file, which SQLite deletes on close, and begin a transaction.

    Args:
        table: The SQL statement that creates its table.
        cache_kib: The most KiB of the database that are held in memory.
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
    """Base class of context managers with a private temporary database.

    Args:
        table: The SQL statement that creates its table.
        cache_kib: The most KiB of the database that are held in memory.
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
