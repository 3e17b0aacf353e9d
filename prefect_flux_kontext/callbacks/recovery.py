"""Adopting a task that a callback names for a row whose submit's reply was lost.

The token says that whoever calls was given the URL with the submit, but the body is not signed.
So a task is adopted only when the service confirms it under our key, when it is not older than
the intent, when no other row has it, and when it is the only such task.
"""

from __future__ import annotations

import asyncio
import logging
from datetime import timedelta
from typing import TYPE_CHECKING

from prefect_flux_kontext.client.retry import jittered_backoff
from prefect_flux_kontext.errors import ApiError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Container, Iterable

    from prefect_flux_kontext.client.client import FluxKontextClient
    from prefect_flux_kontext.ledger.ledger import Ledger
    from prefect_flux_kontext.ledger.records import Entry

logger = logging.getLogger(__name__)

BY = "callback"
_CLOCKS_DIFFER = timedelta(minutes=10)
_ATTEMPTS = 5


async def recover_task(
    client: FluxKontextClient,
    ledger: Ledger,
    entry: Entry,
    named: Iterable[str],
    taken: Container[str],
) -> Entry | None:
    """Record the one task that is the row's, if there is one.

    Args:
        client: The service.
        ledger: Where it is recorded.
        entry: A row whose latest attempt has no outcome.
        named: The tasks that callbacks have named for that attempt.
        taken: Tasks of other rows.

    Returns:
        The row as it is on record then, or None where nothing was adopted.

    Raises:
        LedgerError: It cannot be recorded.
    """
    found = [task_id for task_id in named if await _is_its(client, entry, task_id, taken)]
    if len(found) > 1:
        logger.error(
            "Row %s was called back for %d tasks (%s), so it stays unknown: look in the account's "
            "history which is its own, and whether it is paid for twice.",
            entry.key,
            len(found),
            ", ".join(found),
        )
    if len(found) != 1:
        return None
    recorded = await ledger.accepted(entry, found[0], by=BY)
    if recorded.posted is not None and recorded.posted.task_id != found[0]:
        logger.error(
            "Row %s was called back as task %s and had been settled as %s (task %s) by %s: look "
            "whether it is paid for twice.",
            entry.key,
            found[0],
            recorded.posted.state,
            recorded.posted.task_id,
            recorded.posted.by,
        )
    else:
        logger.info("Row %s, whose submit's reply was lost, is task %s.", entry.key, found[0])
    return recorded


async def _is_its(
    client: FluxKontextClient, entry: Entry, task_id: str, taken: Container[str]
) -> bool:
    if task_id in taken or entry.intent is None:
        logger.warning("Row %s was called back as task %s of another row.", entry.key, task_id)
        return False
    created_at = None
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            created_at = (await client.status(task_id)).created_at
            break
        except ApiError as error:
            # A task that has just ended may be unknown to another of the service's machines.
            again = error.retryable or isinstance(error, NotFoundError)
            if attempt == _ATTEMPTS or not again:
                logger.warning("Row %s was called back as task %s: %s", entry.key, task_id, error)
                return False
            await asyncio.sleep(jittered_backoff(attempt))
    if created_at is not None and created_at < entry.intent.at - _CLOCKS_DIFFER:
        logger.warning("Row %s was called back as task %s of old.", entry.key, task_id)
        return False
    return True
