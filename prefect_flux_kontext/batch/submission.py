"""Paying for a row: room at the account, claim on record, POST, outcome on record.

This is the only path on which a batch spends money.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from prefect_flux_kontext.batch.budget import Budget
from prefect_flux_kontext.batch.spending import Spending, label_row
from prefect_flux_kontext.batch.stopping import StopGate
from prefect_flux_kontext.errors import FluxKontextError, LedgerError, ReplyLostError
from prefect_flux_kontext.ledger.records import Posted
from prefect_flux_kontext.references.ratio import RatioMatcher
from prefect_flux_kontext.references.resolver import References
from prefect_flux_kontext.telemetry import COST, trace

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from prefect_flux_kontext.batch.outage import PostGate
    from prefect_flux_kontext.client.client import (
        FluxKontextClient,
        SubmitAttempts,
        SubmitOutcome,
        SubmitSlot,
    )
    from prefect_flux_kontext.ledger.ledger import Ledger
    from prefect_flux_kontext.ledger.records import Entry
    from prefect_flux_kontext.manifest.row import Row
    from prefect_flux_kontext.models import GenerationRequest

__all__ = ["Submitter"]

logger = logging.getLogger(__name__)


class Submitter:
    """Pays for rows, so that each POST is on record before and after.

    Args:
        client: The service.
        ledger: Where intents and outcomes are recorded.
        posts: Limits POSTs under way, and pauses submitting during an outage.
        budget: What may be spent; None for no cap.
        references: Makes the rows' reference images available to the service.
        ratios: Chooses the ratio of requests with `match`.
        prepare: Returns the request to send for a claimed attempt, with its callback URL.
        gate: Stops submitting.
        columns: Columns whose values are recorded with each payment.

    Attributes:
        gate: Stops submitting.
        accepted: Rows accepted in this run.
        spent: Dollars for the rows accepted in this run.
        spending: The same by the values of the columns.
        outstanding: Keys of rows that this run knows to be paid and not ended.
    """

    def __init__(
        self,
        client: FluxKontextClient,
        ledger: Ledger,
        posts: PostGate,
        budget: Budget | None = None,
        references: References | None = None,
        ratios: RatioMatcher | None = None,
        prepare: Callable[[GenerationRequest, Entry], GenerationRequest] | None = None,
        gate: StopGate | None = None,
        columns: Sequence[str] = (),
    ) -> None:
        self.gate = gate or StopGate()
        self.accepted = 0
        self.spent = 0.0
        self.spending = Spending(columns)
        self.outstanding: set[str] = set()
        self._client = client
        self._ledger = ledger
        self._budget = budget or Budget(None)
        self._references = references or References()
        self._ratios = ratios or RatioMatcher(None)
        self._prepare = prepare or (lambda request, _entry: request)
        self._posts = posts

    @property
    def stopped(self) -> FluxKontextError | None:
        """Why nothing is submitted any more."""
        return self.gate.reason

    def stop(self, reason: FluxKontextError) -> None:
        """Submit nothing from now on; POSTs that have begun are still recorded."""
        self.gate.stop(reason)

    async def drain(self) -> None:
        """Wait until every POST that has begun is on record."""
        await self.gate.wait()

    async def submit(self, row: Row, entry: Entry) -> Entry:
        """Pay for the row's next attempt.

        Returns:
            The row with its accepted task.

        Raises:
            RowAlreadyClaimedError: Another run was first; nothing was sent.
            BatchStoppedError: The batch was stopped, or a budget is reached; nothing was sent.
            LedgerError: The intent could not be recorded; nothing was sent.
            ReferenceImageError: A reference image cannot be used any more; nothing was sent.
            StorageError: A reference image could not be staged; nothing was sent.
            ApiError: See `FluxKontextClient.submit`. If it is `not_accepted`, that is on record;
                otherwise the row is unknown.
        """
        self._budget.check(self._ledger.price_of(row.request), self._label(row, entry))
        request = await self.gate.interruptible(self._ratios.match(row.request))
        row = replace(row, values=request)
        prepared = self._references.prepare(row.request, verify_staged=entry.failures > 0)
        make_request = await self.gate.interruptible(prepared)
        attempts = self._client.submit_attempts()
        while not attempts.is_over:
            slot = await self.gate.interruptible(self._next_slot(attempts))
            entry, outcome = await self.gate.finish(self._pay(slot, row, entry, make_request))
            if outcome.may_retry:
                self.gate.check()  # waiting for the next attempt would be in vain
        if outcome.error is not None:
            raise outcome.error
        return entry

    @trace("slot")
    async def _next_slot(self, attempts: SubmitAttempts) -> SubmitSlot:
        """Wait for a slot at the account and for room among the POSTs under way."""
        slot = await attempts.next_slot()
        try:
            await self._posts.acquire()
        except BaseException:
            slot.release()
            raise
        return slot

    async def _pay(
        self,
        slot: SubmitSlot,
        row: Row,
        entry: Entry,
        make_request: Callable[[], Awaitable[GenerationRequest]],
    ) -> tuple[Entry, SubmitOutcome]:
        """Claim the next attempt, send it, and record what is known of it."""
        price, columns = self._ledger.price_of(row.request), self._label(row, entry)
        outcome = None
        try:
            async with slot:
                self.gate.check()
                request = await make_request()
                await self._budget.reserve(price, columns)
                is_free = True
                try:
                    attempt = await self._ledger.claim(row, entry, columns)
                    try:
                        self.gate.check()  # recording the claim took a while
                        self._budget.check_current()
                        request = self._prepare(request, attempt)
                    except FluxKontextError as error:
                        await self._record_rejection(attempt, error)
                        raise
                    is_free = False
                    outcome = await slot.post(request)
                    is_free = outcome.is_rejected
                    return await self._record(attempt, outcome), outcome
                finally:
                    await self._budget.settle(price, columns, refunded=is_free)
        finally:
            await self._posts.release(outcome)

    def _label(self, row: Row, entry: Entry) -> dict[str, str]:
        """Return the values by which an attempt is counted: those of the first that was paid."""
        first = entry.columns if entry.spent or entry.doubtful else {}
        return label_row(row, self.spending.names) | first

    async def _record(self, attempt: Entry, outcome: SubmitOutcome) -> Entry:
        if outcome.is_accepted:
            return await self._record_acceptance(attempt, outcome.task_id)
        if outcome.error is not None and outcome.is_rejected:
            return await self._record_rejection(attempt, outcome.error)
        return attempt  # an intent without an outcome is what `unknown` looks like

    async def _record_rejection(self, attempt: Entry, error: FluxKontextError) -> Entry:
        try:
            return await self._ledger.record_rejected(attempt, error)
        except LedgerError as trouble:
            raise ReplyLostError(
                f"Not accepted ({error}), but this could not be recorded: {trouble} The ledger "
                f"holds the row as unknown. Settle it: flux-kontext resolve OUTPUT {attempt.key} "
                "--rejected"
            ) from None

    async def _record_acceptance(self, attempt: Entry, task_id: str) -> Entry:
        self.count(attempt)
        try:
            recorded = await self._ledger.record_accepted(attempt, task_id)
        except LedgerError as error:
            logger.error(  # noqa: TRY400 - the task id is what counts
                "Row %s is paid for as task %s, but that could not be recorded: %s If this run "
                "does not store it: flux-kontext resolve OUTPUT %s --accepted %s",
                attempt.key,
                task_id,
                error,
                attempt.key,
                task_id,
            )
            posted = Posted(state="accepted", by=self._ledger.owner, task_id=task_id)
            return attempt.model_copy(update={"posted": posted})
        if recorded.posted is not None and recorded.posted.task_id != task_id:
            logger.error(
                "Row %s was settled as %s by %s while its submit was under way, and then accepted "
                "as task %s. Check whether it was billed twice.",
                attempt.key,
                recorded.posted.state,
                recorded.posted.by,
                task_id,
            )
        return recorded

    def count(self, entry: Entry) -> None:
        """Count a row of this run as accepted."""
        self.accepted += 1
        self.outstanding.add(entry.key)
        if entry.intent is not None:
            self.spent += entry.intent.price
            self.spending.add(entry.columns, entry.intent.price)
            COST.add(entry.intent.price, {"mode": entry.intent.request.mode})
