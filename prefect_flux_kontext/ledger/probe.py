"""A test of a store before anything is paid: can it hold a ledger?"""

from __future__ import annotations

import contextlib
import secrets
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from prefect_flux_kontext.errors import ConfigurationError, LedgerError

if TYPE_CHECKING:
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
    record, missing = f"probe/{name}.json", f"probe/{name}-missing.json"
    need = "create a record that does not exist yet (on S3: PutObject with If-None-Match)"
    try:
        is_fine = await store.create(record, b"1")
        if is_fine:
            need = "refuse to create a record that exists (on S3: If-None-Match)"
            is_fine = not await store.create(record, b"2")
        if is_fine:
            need = "read a record back (on S3: s3:GetObject)"
            is_fine = await store.read(record) == b"1"
        if is_fine:
            need = "tell that a record does not exist (on S3: s3:ListBucket)"
            is_fine = await store.read(missing) is None
        if is_fine:
            need = "list records (on S3: s3:ListBucket)"
            is_fine = f"{name}.json" in await store.list_names("probe")
    except LedgerError as error:
        raise _unfit(store, need, error.message) from None
    if not is_fine:
        raise _unfit(store, need, "It was tried with a record in its folder `probe`.")
    with contextlib.suppress(LedgerError):
        await store.remove(record)
    passed.add(str(store))


def _unfit(store: RecordStore, need: str, detail: str) -> ConfigurationError:
    return ConfigurationError(
        f"{store} cannot hold a ledger, so nothing was paid: the store does not {need}. {detail}"
    )
