"""Recovery of the task of an unknown row, by its callback.

The token proves that the caller got the URL from the submit, but the body is not signed. So a row
takes a task only if the service confirms the task under our key, the task is not older than the
intent, no attempt on record has it, and it is the only such task.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Container, Iterable
from datetime import timedelta
from typing import TYPE_CHECKING

from prefect_flux_kontext.client.retry import jittered_backoff
from prefect_flux_kontext.errors import ApiError, NotFoundError
from prefect_flux_kontext.ledger.waves import read_finished_rows, read_open_waves

if TYPE_CHECKING:
    from prefect_flux_kontext.client.client import FluxKontextClient
    from prefect_flux_kontext.ledger.ledger import Ledger
    from prefect_flux_kontext.ledger.records import Entry

logger = logging.getLogger(__name__)

SETTLED_BY = "callback"
"""Who settled the row, as the ledger records it."""

_CLOCK_TOLERANCE = timedelta(minutes=10)
"""How much older than the intent a task may be: the service has its own clock."""

_STATUS_TRIES = 5


async def recover_task(
    client: FluxKontextClient,
    ledger: Ledger,
    entry: Entry,
    named: Iterable[str],
    taken: Container[str],
) -> Entry | None:
    """Record the row's task if exactly one of the named tasks can be it, and return the row.

    Callbacks named the tasks for the row's latest attempt, which has no outcome. Other rows have
    the `taken` tasks.

    Raises:
        LedgerError: The task cannot be recorded.
    """
    recorded_ids = await _find_recorded(ledger, entry, set(named))
    found = [
        task_id
        for task_id in named
        if await _is_task_of_row(client, entry, task_id, recorded_ids, taken)
    ]
    if len(found) > 1:
        logger.error(
            "Callbacks of row %s name %d tasks (%s), so the row stays unknown. Check in the "
            "account's history which task is its own and whether it was billed twice.",
            entry.key,
            len(found),
            ", ".join(found),
        )
    if len(found) != 1:
        return None
    recorded = await ledger.record_accepted(entry, found[0], by=SETTLED_BY)
    if recorded.posted is not None and recorded.posted.task_id != found[0]:
        logger.error(
            "A callback of row %s names task %s, but the row had been settled as %s (task %s) by "
            "%s. Check in the account's history whether it was billed twice.",
            entry.key,
            found[0],
            recorded.posted.state,
            recorded.posted.task_id,
            recorded.posted.by,
        )
    else:
        logger.info("Row %s was unknown; its callback names task %s.", entry.key, found[0])
    return recorded


async def _find_recorded(ledger: Ledger, entry: Entry, named: set[str]) -> set[str]:
    """Return those of the named tasks that some attempt on record has."""
    if not named:
        return set()
    recorded = {
        row.ended.task_id
        async for row in read_finished_rows(ledger.store)
        if row.ended.task_id in named
    }
    # The tasks of this run's own waves are known without reading them.
    keys = {
        key
        async for wave in read_open_waves(ledger.store)
        if wave.owner != ledger.owner
        for key in wave.keys
    }
    found = await asyncio.gather(*map(ledger.read_task_ids, {entry.key, *keys}))
    return recorded | named.intersection(itertools.chain(*found))


async def _is_task_of_row(
    client: FluxKontextClient,
    entry: Entry,
    task_id: str,
    recorded: Container[str],
    taken: Container[str],
) -> bool:
    if task_id in recorded or task_id in taken or entry.intent is None:
        logger.warning("A callback of row %s names task %s of another row.", entry.key, task_id)
        return False
    created_at = None
    for number in range(1, _STATUS_TRIES + 1):
        try:
            created_at = (await client.status(task_id)).created_at
            break
        except ApiError as error:
            # Another machine of the service may not know a task yet that has just ended.
            should_retry = error.retryable or isinstance(error, NotFoundError)
            if number == _STATUS_TRIES or not should_retry:
                logger.warning(
                    "A callback of row %s names task %s, which cannot be confirmed: %s",
                    entry.key,
                    task_id,
                    error,
                )
                return False
            await asyncio.sleep(jittered_backoff(number))
    if created_at is not None and created_at < entry.intent.at - _CLOCK_TOLERANCE:
        logger.warning(
            "A callback of row %s names task %s, which is older than its submit.",
            entry.key,
            task_id,
        )
        return False
    return True
