"""Cache of what is known about references, on disk so that its size takes no memory; locks."""

from __future__ import annotations

import hashlib
import threading
import weakref
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakValueDictionary

from prefect_flux_kontext.storage.temp_db import open_temp_database

if TYPE_CHECKING:
    import sqlite3


class ReferenceInfo(NamedTuple):
    """What is known about a reference that is not on the web."""

    identity: str = ""  # of its content; empty if it could not be read
    problem: str | None = None  # why it could not be read
    checked: bool = False
    flaw: str | None = None  # why its content is invalid
    large: bool = False  # its content must be shrunk
    staged: str | None = None  # name of the staged copy


class ReferenceCache:
    """Maps references to `ReferenceInfo` in a private temporary database. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None

    def get(self, reference: str) -> ReferenceInfo | None:
        """Return what is known about a reference, or None."""
        if self._connection is None:
            return None
        with self._lock:
            found = self._connection.execute(
                "SELECT identity, problem, checked, flaw, large, staged FROM infos "
                "WHERE reference = ?",
                (_cache_key(reference),),
            ).fetchone()
        return ReferenceInfo(*found) if found else None

    def put(self, reference: str, info: ReferenceInfo) -> None:
        """Store what is known about a reference; replaces an earlier entry."""
        with self._lock:
            self._database().execute(
                "INSERT OR REPLACE INTO infos VALUES (?, ?, ?, ?, ?, ?, ?)",
                (_cache_key(reference), *info),
            )

    def _database(self) -> sqlite3.Connection:
        if self._connection is None:
            self._connection = open_temp_database(
                "CREATE TABLE infos (reference BLOB PRIMARY KEY, identity TEXT, problem TEXT, "
                "checked INTEGER, flaw TEXT, large INTEGER, staged TEXT) WITHOUT ROWID"
            )
            weakref.finalize(self, self._connection.close)
        return self._connection


def _cache_key(reference: str) -> bytes:
    return hashlib.sha256(reference.encode(errors="surrogatepass")).digest()[:16]


class Locks:
    """One lock per name; a lock is dropped when nothing refers to it."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locks: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()

    def get(self, name: str) -> threading.Lock:
        """Return the lock of a name. Keep a reference to it while using it."""
        with self._guard:
            return self._locks.setdefault(name, threading.Lock())
