"""What is known of references by now, for as many as there are, with little held in memory."""

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
    """What is known of a reference that is not on the web.

    Attributes:
        identity: What its content is known by; nothing where it could not be looked at.
        problem: Why it could not be looked at.
        checked: Whether the content was checked.
        flaw: What is wrong with the content.
        large: Whether the content must be shrunk.
        staged: The name under which it is staged.
    """

    identity: str = ""
    problem: str | None = None
    checked: bool = False
    flaw: str | None = None
    large: bool = False
    staged: str | None = None


class ReferenceCache:
    """Looks by reference, in a private database in a temporary file. Any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._opened: sqlite3.Connection | None = None

    def get(self, reference: str) -> ReferenceInfo | None:
        """What is known of a reference, if anything."""
        if self._opened is None:
            return None
        with self._lock:
            found = self._opened.execute(
                "SELECT identity, problem, checked, flaw, large, staged FROM looks "
                "WHERE reference = ?",
                (_short(reference),),
            ).fetchone()
        return ReferenceInfo(*found) if found else None

    def put(self, reference: str, look: ReferenceInfo) -> None:
        """Keep what is known of a reference now."""
        with self._lock:
            self._database().execute(
                "INSERT OR REPLACE INTO looks VALUES (?, ?, ?, ?, ?, ?, ?)",
                (_short(reference), *look),
            )

    def _database(self) -> sqlite3.Connection:
        if self._opened is None:
            self._opened = open_temp_database(
                "CREATE TABLE looks (reference BLOB PRIMARY KEY, identity TEXT, problem TEXT, "
                "checked INTEGER, flaw TEXT, large INTEGER, staged TEXT) WITHOUT ROWID"
            )
            weakref.finalize(self, self._opened.close)
        return self._opened


def _short(reference: str) -> bytes:
    return hashlib.sha256(reference.encode(errors="surrogatepass")).digest()[:16]


class Locks:
    """A lock for each name, gone when nobody holds it."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locks: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()

    def of(self, name: str) -> threading.Lock:
        """The lock of that name; keep it for as long as it is used."""
        with self._guard:
            return self._locks.setdefault(name, threading.Lock())
