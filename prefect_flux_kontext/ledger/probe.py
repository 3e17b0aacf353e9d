"""A test of a store before anything is paid: can it hold a ledger?"""

from __future__ import annotations

import contextlib
import secrets
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from prefect_flux_kontext.errors import ConfigurationError, LedgerError

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from prefect_flux_kontext.ledger.store import RecordStore

# The stores that passed, by filesystem: a store is tested once in a process.
_passed: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()


async def probe_store(store: RecordStore) -> None:
    """Check that a store can do what the ledger needs, with a record of its own.

    That is to create a record exclusively, to read it back, to tell that a record is missing, and
    to list records. Permission to remove records is not needed: the test's record then stays.

    Raises:
        ConfigurationError: The store cannot do it; the message says what is missing.
    """
    passed = _passed.setdefault(store.fs, set())
    if str(store) in passed:
        return
    name = secrets.token_hex(8)
    record = f"probe/{name}.json"

    async def is_listed() -> bool:
        return f"{name}.json" in await store.list_names("probe")

    async def is_missing_told() -> bool:
        return await store.read(f"probe/{name}-missing.json") is None

    async def is_read_back() -> bool:
        return await store.read(record) == b"1"

    async def is_exclusive() -> bool:
        return not await store.create(record, b"2")

    await _require(
        store, "create a record", "PutObject with If-None-Match", store.create(record, b"1")
    )
    await _require(store, "read a record back", "s3:GetObject", is_read_back())
    await _require(store, "refuse to create a record twice", "If-None-Match", is_exclusive())
    await _require(store, "tell that a record is missing", "s3:ListBucket", is_missing_told())
    await _require(store, "list records", "s3:ListBucket", is_listed())
    with contextlib.suppress(LedgerError):
        await store.remove(record)
    passed.add(str(store))


async def _require(store: RecordStore, ability: str, on_s3: str, test: Awaitable[bool]) -> None:
    try:
        detail = "" if await test else " It does not."
    except LedgerError as error:
        detail = f" {error.message}"
    if detail:
        raise ConfigurationError(
            f"{store} cannot hold a ledger, so nothing was paid: the store has to {ability} (on "
            f"S3: {on_s3}).{detail}"
        )
