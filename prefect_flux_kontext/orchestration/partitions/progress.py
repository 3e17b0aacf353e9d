"""The progress of partitions: one small record each, beside the ledger, which the batch reads.

`_ledger/partitions/<flow run>.json` holds the counts of a partition. It is a view; the ledger is
the truth.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from pydantic import ValidationError

from prefect_flux_kontext.batch.summary import BatchSummary
from prefect_flux_kontext.errors import LedgerError
from prefect_flux_kontext.ledger.records import RECORD_VERSION

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from prefect_flux_kontext.ledger.store import RecordStore

logger = logging.getLogger(__name__)

WRITE_INTERVAL_SECONDS = 5.0
"""As often as the batch reads the record."""


@asynccontextmanager
async def report_progress(
    store: RecordStore, name: str, batch: BatchSummary
) -> AsyncIterator[None]:
    """Keep the progress record of a partition up to date while the block runs."""
    writing = asyncio.create_task(_write_periodically(store, name, batch))
    try:
        yield
    finally:
        writing.cancel()
        await asyncio.wait({writing})


async def _write_periodically(store: RecordStore, name: str, batch: BatchSummary) -> None:
    async def write() -> None:
        counts = batch.model_dump(mode="json", exclude={"failures", "output"})
        record = {"version": RECORD_VERSION, **counts}
        try:
            await store.replace(_get_record_name(name), json.dumps(record).encode())
        except LedgerError as error:
            logger.debug("The progress of this partition was not written: %s", error)

    try:
        while True:
            await asyncio.sleep(WRITE_INTERVAL_SECONDS)
            await write()
    finally:
        await write()


async def read_progress(store: RecordStore, name: str) -> BatchSummary:
    """Return the counts of a partition's rows so far; zeros if it has no valid record."""
    try:
        return BatchSummary.model_validate_json(await store.read(_get_record_name(name)) or b"{}")
    except (LedgerError, ValidationError):
        return BatchSummary()


async def remove_progress(store: RecordStore, name: str) -> None:
    """Remove the progress record of a partition."""
    with contextlib.suppress(LedgerError):
        await store.remove(_get_record_name(name))


def _get_record_name(name: str) -> str:
    return f"partitions/{name}.json"
