"""Progress of partitions: a small record for each, beside the ledger, read by the batch.

`_ledger/partitions/<flow run>.json` holds the counts of a partition.
It is a view; the ledger is the truth.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from pydantic import ValidationError

from prefect_flux_kontext.batch.summary import BatchSummary
from prefect_flux_kontext.errors import LedgerError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from prefect_flux_kontext.ledger.store import RecordStore

logger = logging.getLogger(__name__)

TOLD_EVERY = 5.0


@asynccontextmanager
async def report_progress(
    store: RecordStore, name: str, batch: BatchSummary
) -> AsyncIterator[None]:
    """Keep the record of a partition up to date while the block runs.

    Args:
        store: The ledger.
        name: The partition's flow run.
        batch: What became of the partition's rows so far; it moves.
    """
    telling = asyncio.create_task(_tell(store, name, batch))
    try:
        yield
    finally:
        telling.cancel()
        await asyncio.wait({telling})


async def _tell(store: RecordStore, name: str, batch: BatchSummary) -> None:
    async def write() -> None:
        counts = batch.model_dump_json(exclude={"failures", "output"})
        try:
            await store.replace(_record(name), counts.encode())
        except LedgerError as error:
            logger.debug("How far this partition is was not written: %s", error)

    try:
        while True:
            await asyncio.sleep(TOLD_EVERY)
            await write()
    finally:
        await write()


async def read_progress(store: RecordStore, name: str) -> BatchSummary:
    """What became of a partition's rows so far, as far as it has told."""
    try:
        return BatchSummary.model_validate_json(await store.read(_record(name)) or b"{}")
    except (LedgerError, ValidationError):
        return BatchSummary()


async def forget_progress(store: RecordStore, name: str) -> None:
    """Remove the record of a partition."""
    with contextlib.suppress(LedgerError):
        await store.remove(_record(name))


def _record(name: str) -> str:
    return f"partitions/{name}.json"
