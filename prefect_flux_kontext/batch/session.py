"""What a batch needs open while it runs: connections, ledger, owner; all closed afterwards."""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prefect_flux_kontext.batch.budget import open_budget
from prefect_flux_kontext.batch.rows import RowRunner
from prefect_flux_kontext.batch.submitting import Submitter
from prefect_flux_kontext.errors import BatchStoppedError
from prefect_flux_kontext.ledger.checkpoints import finished_rows
from prefect_flux_kontext.ledger.ledger import Ledger
from prefect_flux_kontext.ledger.owners import living_owner
from prefect_flux_kontext.ledger.records import Stored
from prefect_flux_kontext.ledger.store import RecordStore
from prefect_flux_kontext.results import download_client

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from prefect_flux_kontext.api.client import FluxKontextClient
    from prefect_flux_kontext.batch.rows import RowOptions
    from prefect_flux_kontext.settings import FluxKontextSettings
    from prefect_flux_kontext.storage import OutputFolder

logger = logging.getLogger(__name__)

LEDGER_FOLDER = "_ledger"


def ledger_store(output: OutputFolder) -> RecordStore:
    """Where the ledger of an output is: beside the images."""
    return RecordStore(f"{output}/{LEDGER_FOLDER}")


@dataclass(frozen=True)
class Session:
    """A batch's open things."""

    output: OutputFolder
    ledger: Ledger
    submitter: Submitter
    rows: RowRunner


@asynccontextmanager
async def batch_session(
    client: FluxKontextClient,
    output: OutputFolder,
    options: RowOptions,
    settings: FluxKontextSettings,
) -> AsyncIterator[Session]:
    """Open what a batch needs.

    However the block is left, POSTs that have begun are recorded before this returns.

    Raises:
        ConfigurationError: There is a budget, and another run is paying into the output.
        LedgerError: The ledger cannot be read or written; nothing was paid.
        NotConnectedError: Nothing answers at the base URL.
        UnauthorizedError: The service does not know the key.
    """
    store = ledger_store(output)
    async with client, download_client(base_url=client.base_url) as http:
        await client.check()
        async with living_owner(store) as owner:
            ledger = Ledger(store, owner, settings.prices())
            budget = await open_budget(store, owner, options)
            submitter = Submitter(client, ledger, settings.concurrent_submits, budget)
            stored = await _stored(store)
            rows = RowRunner(client, http, output, ledger, submitter, stored, options)
            try:
                yield Session(output, ledger, submitter, rows)
            finally:
                submitter.stop(BatchStoppedError("The batch is over."))
                await asyncio.shield(submitter.drained())
                if submitter.outstanding:
                    logger.warning(
                        "%d rows are paid for and not yet stored. To collect them: flux-kontext "
                        "collect %s",
                        len(submitter.outstanding),
                        output,
                    )


async def _stored(store: RecordStore) -> dict[str, Stored]:
    # A failed row may have gone on in a later attempt, so only what is stored is taken as read.
    return {
        row.key: Stored.of(row.ended)
        async for row in finished_rows(store)
        if row.ended.state == "stored"
    }
