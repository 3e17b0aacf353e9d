"""Paying for rows: an intent before each POST, its outcome right after, nothing once stopped."""

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
    """Submits rows, so that each POST is on record before and after.

    A POST that has begun is seen to its end, whatever is cancelled meanwhile: its reply is
    worth money.

    Args:
        client: The service.
        ledger: Where intents and outcomes go.
        posts_at_once: POSTs under way at once; apart from the tasks that run, because these are
            what a crash makes doubtful.
        budget: What may be spent; None for no cap.
        references: Has the rows' reference images where the service can fetch them.
        prepare: Makes of a row's request, and the attempt that was claimed, what is sent.

    Attributes:
        stopped: Why nothing is submitted any more.
        accepted: Rows accepted in this run.
        spent: Dollars for the rows accepted in this run.
        outstanding: Keys of rows that are paid for and have not ended, so far as this run knows.
    """

    def __init__(
        self,
        client: FluxKontextClient,
        ledger: Ledger,
        posts_at_once: int,
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
        self._room = asyncio.Semaphore(posts_at_once)
        self._all: set[asyncio.Task[Entry]] = set()
        self._posting: set[asyncio.Task[Entry]] = set()

    def stop(self, why: FluxKontextError) -> None:
        """Submit nothing from now on; POSTs that have begun are still recorded."""
        if self.stopped is None:
            self.stopped = why
            for work in self._all - self._posting:
                work.cancel()

    async def drained(self) -> None:
        """Wait until every POST that has begun is on record."""
        if self._posting:
            await asyncio.wait(self._posting)

    async def submit(self, row: Row, entry: Entry) -> Entry:
        """Pay for the row's next attempt.

        Returns:
            The row with its accepted task.

        Raises:
            RowTakenError: Another run was first; nothing was sent.
            BatchStoppedError: The batch was stopped; nothing was sent.
            LedgerError: The intent could not be recorded; nothing was sent.
            ReferenceImageError: A reference image is not to be used any more; nothing was sent.
            StorageError: A reference image could not be staged; nothing was sent.
            ApiError: See `FluxKontextClient.submit`; where it is `not_accepted`, that is on
                record, else the row is doubtful.
        """
        self._check_going_on()
        work = asyncio.create_task(self._submit(row, entry))
        self._all.add(work)
        work.add_done_callback(self._all.discard)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            if work not in self._posting:
                work.cancel()
            if work.cancelled():
                self._check_going_on()
            raise

    async def _submit(self, row: Row, entry: Entry) -> Entry:
        latest = entry
        work = cast("asyncio.Task[Entry]", asyncio.current_task())
        price = self._ledger.price_of(row.request)
        sending = await self._references.prepared(row.request, doubted=entry.failures > 0)

        @asynccontextmanager
        async def attempt() -> AsyncIterator[GenerationRequest]:
            nonlocal latest
            async with self._room:
                self._check_going_on()
                request = await sending()
                await self._budget.reserve(price)
                self._posting.add(work)
                sent = owed = False
                try:
                    latest = await self._ledger.claim(row, latest)
                    self._check_going_on()  # writing it took a while
                    request = self._prepare(request, latest)
                    sent = owed = True
                    yield request
                except FluxKontextError as error:
                    unsent = error.not_accepted or not sent
                    owed = not unsent
                    if unsent and latest.state is State.INTENT:
                        latest = await self._reject(latest, error)
                    self._posting.discard(work)
                    if unsent and error.retryable:
                        # It would else be waited out only to find the batch stopped.
                        self._check_going_on()
                    raise
                except Exception as error:
                    if not sent:
                        raise
                    # Who knows how far it got.
                    told = f"{type(error).__name__}: {error}"
                    raise ReplyLostError(f"The submit met an unforeseen error: {told}") from None
                finally:
                    await self._budget.settle(price, given_back=not owed)

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
                f"Not accepted ({error}), which could not be recorded: {trouble} So the ledger "
                f"does not know: flux-kontext resolve OUTPUT {entry.key} --rejected"
            ) from None

    async def _record(self, entry: Entry, task_id: str) -> Entry:
        self.count(entry)
        try:
            recorded = await self._ledger.accepted(entry, task_id)
        except LedgerError as error:
            logger.error(  # noqa: TRY400 - the id is what counts
                "Row %s is paid for as task %s, which could not be recorded: %s If this run does "
                "not store it: flux-kontext resolve OUTPUT %s --accepted %s",
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
                "Row %s was settled as %s by %s while its submit was under way, and then accepted "
                "as task %s: look whether it is paid for twice.",
                entry.key,
                recorded.posted.state,
                recorded.posted.by,
                task_id,
            )
        return recorded

    def count(self, entry: Entry) -> None:
        """Count a row of this run as accepted."""
        self.accepted += 1
        self.outstanding.add(entry.key)
        self.spent += entry.intent.price if entry.intent else 0.0

    def _check_going_on(self) -> None:
        if self.stopped is not None:
            raise BatchStoppedError(f"Not submitted: {self.stopped}")
