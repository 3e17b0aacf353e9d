"""A cache that is bounded in bytes and makes each thing once."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Hashable

T = TypeVar("T")


class SharedCache(Generic[T]):
    """Least recently used goes first; whoever asks for a thing in the making waits for it.

    A failure reaches everybody who waits and is not kept.

    Args:
        capacity: Bytes held at most (a single larger thing is handed out but not kept).
        weigh: Bytes of one thing.
    """

    def __init__(self, capacity: int, weigh: Callable[[T], int]) -> None:
        self._capacity = capacity
        self._weigh = weigh
        self._held: OrderedDict[Hashable, T] = OrderedDict()
        self._weight = 0
        self._making: dict[Hashable, asyncio.Future[T]] = {}

    def peek(self, key: Hashable) -> T | None:
        """What is held under the key, now."""
        thing = self._held.get(key)
        if thing is not None:
            self._held.move_to_end(key)
        return thing

    async def get(self, key: Hashable, make: Callable[[], Awaitable[T]]) -> T:
        """What is held under the key, else what `make` makes."""
        thing = self.peek(key)
        if thing is not None:
            return thing
        making = self._making.get(key)
        if making is None:
            making = asyncio.ensure_future(self._make(key, make))
            self._making[key] = making
        # Shielded: one client that hangs up must not take the thing from the others.
        return await asyncio.shield(making)

    async def _make(self, key: Hashable, make: Callable[[], Awaitable[T]]) -> T:
        try:
            thing = await make()
        finally:
            del self._making[key]
        weight = self._weigh(thing)
        if weight <= self._capacity:
            self._held[key] = thing
            self._weight += weight
            while self._weight > self._capacity:
                _, dropped = self._held.popitem(last=False)
                self._weight -= self._weigh(dropped)
        return thing

    def clear(self) -> None:
        """Forget everything held."""
        self._held.clear()
        self._weight = 0
