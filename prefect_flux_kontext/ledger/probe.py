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

    async def require(ability: str, on_s3: str, request: Awaitable[Any], expected: Any) -> None:
        try:
            detail = "" if await request == expected else " It does not."
        except LedgerError as error:
            detail = f" {error.message}"
        if detail:
            raise ConfigurationError(
                f"{store} cannot hold a ledger, so nothing was paid: the store has to {ability} "
                f"(on S3: {on_s3}).{detail}"
            )

    conditional, listing = "If-None-Match", "s3:ListBucket"
    create, missing = store.create, f"probe/{name}-missing.json"
    await require("create a record", f"PutObject with {conditional}", create(record, b"1"), True)
    await require("read a record back", "s3:GetObject", store.read(record), b"1")
    await require("refuse to create a record twice", conditional, create(record, b"2"), False)
    await require("tell that a record is missing", listing, store.read(missing), None)
    await require("list records", listing, is_listed(), True)
    with contextlib.suppress(LedgerError):
        await store.remove(record)
    passed.add(str(store))
