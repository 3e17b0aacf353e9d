"""Submission of rows: an intent is recorded before each POST, and its outcome right after."""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, cast

from prefect_flux_kontext.batch.budget import Budget
from prefect_flux_kontext.errors import (
    BatchStoppedError,
    FluxKontextError,
    LedgerError,
    ReplyLostError,
)
from prefect_flux_kontext.ledger.records import Posted, State
from prefect_flux_kontext.references.resolver import References

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from prefect_flux_kontext.client.client import FluxKontextClient
    from prefect_flux_kontext.ledger.ledger import Ledger
    from prefect_flux_kontext.ledger.records import Entry
    from prefect_flux_kontext.manifest.row import Row
    from prefect_flux_kontext.models import GenerationRequest

logger = logging.getLogger(__name__)


class Submitter:
    """Submits rows, and records each POST in the ledger before and after.

    A POST that has begun is never cancelled, because its reply names a paid task.

    Args:
        client: The client of the service.
        ledger: Where intents and outcomes are recorded.
        max_posts: POSTs in flight at a time. They are limited apart from running tasks, because a
            crash leaves their rows unknown.
        budget: What may be spent; None for no cap.
        references: Makes the rows' reference images available to the service.
        prepare: Makes the request to send from a row's request and the claimed attempt.

    Attributes:
        stopped: Why nothing is submitted any more; None while rows are submitted.
        accepted: Number of rows accepted in this run.
        spent: Dollars for the rows accepted in this run.
        outstanding: Keys of rows that are paid for and have not ended, as far as this run knows.
    """

    def __init__(
        self,
        client: FluxKontextClient,
        ledger: Ledger,
        max_posts: int,
        budget: Budget | None = None,
        references: References | None = None,
        prepare: Callable[[GenerationRequest, Entry], GenerationRequest] | None = None,
    ) -> None:
        self.stopped: FluxKontextError | None = None
        self.accepted = 0
        self.spent = 0.0
        self.outstanding: set[str] = set()
        self._client = client
        self._ledger = ledger
        self._budget = budget or Budget(None)
        self._references = references or References()
        self._prepare = prepare or (lambda request, _entry: request)
        self._post_slots = asyncio.Semaphore(max_posts)
        self._all: set[asyncio.Task[Entry]] = set()
        self._posting: set[asyncio.Task[Entry]] = set()

    def stop(self, reason: FluxKontextError) -> None:
        """Submit nothing from now on; POSTs that have begun are still recorded."""
        if self.stopped is None:
            self.stopped = reason
            for work in self._all - self._posting:
                work.cancel()

    async def drained(self) -> None:
        """Wait until the outcome of every POST that has begun is recorded."""
        if self._posting:
            await asyncio.wait(self._posting)

    async def submit(self, row: Row, entry: Entry) -> Entry:
        """Pay for the row's next attempt.

        Returns:
            The row with its accepted task.

        Raises:
            RowAlreadyClaimedError: Another run claimed the attempt first; nothing was sent.
            BatchStoppedError: The batch was stopped; nothing was sent.
            LedgerError: The intent could not be recorded; nothing was sent.
            ReferenceImageError: A reference image is missing, changed or invalid; nothing was
                sent.
            StorageError: A reference image could not be staged; nothing was sent.
            ApiError: See `FluxKontextClient.submit`. If it is `not_accepted`, that is recorded;
                else the row's outcome is unknown.
        """
        self._raise_if_stopped()
        work = asyncio.create_task(self._submit(row, entry))
        self._all.add(work)
        work.add_done_callback(self._all.discard)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            if work not in self._posting:
                work.cancel()
            if work.cancelled():
                self._raise_if_stopped()
            raise

    async def _submit(self, row: Row, entry: Entry) -> Entry:
        latest = entry
        work = cast("asyncio.Task[Entry]", asyncio.current_task())
        price = self._ledger.price_of(row.request)
        sending = await self._references.prepared(row.request, doubted=entry.failures > 0)

        @asynccontextmanager
        async def attempt() -> AsyncIterator[GenerationRequest]:
            nonlocal latest
            async with self._post_slots:
                self._raise_if_stopped()
                request = await sending()
                await self._budget.reserve(price)
                self._posting.add(work)
                sent = may_be_billed = False
                try:
                    latest = await self._ledger.claim(row, latest)
                    self._raise_if_stopped()  # the batch may have stopped during the write
                    request = self._prepare(request, latest)
                    sent = may_be_billed = True
                    yield request
                except FluxKontextError as error:
                    not_accepted = error.not_accepted or not sent
                    may_be_billed = not not_accepted
                    if not_accepted and latest.state is State.INTENT:
                        latest = await self._reject(latest, error)
                    self._posting.discard(work)
                    if not_accepted and error.retryable:
                        # Otherwise the client would wait for its retry and only then stop.
                        self._raise_if_stopped()
                    raise
                except Exception as error:
                    if not sent:
                        raise
                    # The request may have reached the service, so the outcome is unknown.
                    raise ReplyLostError(
                        f"Unexpected error during the submit: {type(error).__name__}: {error}"
                    ) from None
                finally:
                    await self._budget.settle(price, refunded=not may_be_billed)

        try:
            task = await self._client.submit(row.request, around_post=attempt)
            return await self._record(latest, task.task_id)
        finally:
            self._posting.discard(work)

    async def _reject(self, entry: Entry, error: FluxKontextError) -> Entry:
        try:
            return await self._ledger.rejected(entry, error)
        except LedgerError as trouble:
            raise ReplyLostError(
                f"Not accepted ({error}), but that could not be recorded: {trouble} To record "
                f"it: flux-kontext resolve OUTPUT {entry.key} --rejected"
            ) from None

    async def _record(self, entry: Entry, task_id: str) -> Entry:
        self.count(entry)
        try:
            recorded = await self._ledger.accepted(entry, task_id)
        except LedgerError as error:
            logger.error(  # noqa: TRY400 - the message has the id, a traceback adds nothing
                "Row %s is paid for as task %s, but that could not be recorded: %s If this run "
                "does not store it: flux-kontext resolve OUTPUT %s --accepted %s",
                entry.key,
                task_id,
                error,
                entry.key,
                task_id,
            )
            posted = Posted(state="accepted", by=self._ledger.owner, task_id=task_id)
            return entry.model_copy(update={"posted": posted})
        if recorded.posted is not None and recorded.posted.task_id != task_id:
            logger.error(
                "Row %s was settled as %s by %s during its submit, and then accepted as task %s. "
                "Check whether it was billed twice.",
                entry.key,
                recorded.posted.state,
                recorded.posted.by,
                task_id,
            )
        return recorded

    def count(self, entry: Entry) -> None:
        """Count a row as accepted in this run."""
        self.accepted += 1
        self.outstanding.add(entry.key)
        self.spent += entry.intent.price if entry.intent else 0.0

    def _raise_if_stopped(self) -> None:
        if self.stopped is not None:
            raise BatchStoppedError(f"Not submitted: {self.stopped}")
