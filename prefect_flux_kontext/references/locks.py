"""Locks by name, as many as are in use."""

from __future__ import annotations

import threading
from weakref import WeakValueDictionary


class Locks:
    """A lock for each name, gone when nobody holds it."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locks: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()

    def of(self, name: str) -> threading.Lock:
        """The lock of that name; keep it for as long as it is used."""
        with self._guard:
            return self._locks.setdefault(name, threading.Lock())
