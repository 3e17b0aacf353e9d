"""The way of one row, from wherever the ledger says it stands to its image in its place."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from prefect_flux_kontext.api.waiting import wait_until_ended
from prefect_flux_kontext.batch.policy import Breaker, FailurePolicy
from prefect_flux_kontext.batch.summary import BatchSummary, RowOutcome
from prefect_flux_kontext.errors import (
    BatchStoppedError,
    DownloadError,
    FluxKontextError,
    GenerationFailedError,
    LedgerError,
    RefusedError,
    ReplyLostError,
    ServiceTroubleError,
    UnreadableReplyError,
)
from prefect_flux_kontext.ledger.ledger import RowTakenError
from prefect_flux_kontext.ledger.records import GIVEN_UP, Stored
from prefect_flux_kontext.ledger.states import State
from prefect_flux_kontext.manifest.rows import RefusedRow
from prefect_flux_kontext.models import utc_now
from prefect_flux_kontext.results import name_stored, persist_result

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from datetime import datetime

    from prefect_flux_kontext.api.cadence import PollingCadence
    from prefect_flux_kontext.api.client import FluxKontextClient
    from prefect_flux_kontext.api.connections import Connections
    from prefect_flux_kontext.batch.submitting import Submitter
    from prefect_flux_kontext.ledger.ledger import Ledger
    from prefect_flux_kontext.ledger.records import Entry
    from prefect_flux_kontext.manifest.rows import Row
    from prefect_flux_kontext.storage import OutputFolder

logger = logging.getLogger(__name__)

_DOUBTFUL = (ReplyLostError, ServiceTroubleError, UnreadableReplyError)


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """What a person decides about the rows of a batch.

    Attributes:
        cadence: When to ask how a task is doing.
        policy: What a failure means.
        resubmit_unknown: Pay again for rows that may be paid for already.
        retry_failed: Pay again for rows that have failed.
        result_days: Days for which the service keeps a result.
        budget_usd: Dollars that the output may cost over all its runs; None for no cap.
    """

    cadence: PollingCadence
    policy: FailurePolicy = field(default_factory=FailurePolicy)
    resubmit_unknown: bool = False
    retry_failed: bool = False
    result_days: float = 15.0
    budget_usd: float | None = None


class RowRunner:
    """Runs rows side by side, with one client, ledger and connection pool for all.

    Args:
        client: The service.
        http: For downloads.
        output: Where images go.
        ledger: Where it stands what was paid for.
        submitter: Pays.
        stored: What earlier runs have stored, by row key.
        options: What a person has decided.

    Attributes:
        progress: What became of the rows so far; it moves while they run.
        unstored: The lines of rows that failed, with what became of them.
        latest: Where the ledger says that the rows of unfinished waves stand, by row key.
        submits: Whether rows are paid for, or only what is paid for already is collected.
    """

    def __init__(
        self,
        client: FluxKontextClient,
        http: Connections,
        output: OutputFolder,
        ledger: Ledger,
        submitter: Submitter,
        stored: Mapping[str, Stored],
        options: RowOptions,
    ) -> None:
        self.progress = BatchSummary(output=str(output))
        self.unstored: list[tuple[Mapping[str, str], RowOutcome]] = []
        self.latest: dict[str, Entry] = {}
        self.submits = True
        self.stored = stored
        self.submitter = submitter
        self._client = client
        self._http = http
        self._output = output
        self._ledger = ledger
        self.options = options
        self._breaker = Breaker()
        self._ended_now: set[str] = set()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def run(
        self, rows: Sequence[Row | RefusedRow], row_ended: Callable[[], None]
    ) -> BatchSummary:
        """Run rows and count what became of them; a bad row fails alone."""
        counted = BatchSummary()

        async def run(row: Row | RefusedRow) -> RowOutcome:
            try:
                return await self._run(row)
            finally:
                row_ended()

        async with asyncio.TaskGroup() as group:
            running = [group.create_task(run(row)) for row in rows]
        for row in running:
            counted.count(row.result())
        return counted

    async def _run(self, row: Row | RefusedRow) -> RowOutcome:
        if isinstance(row, RefusedRow):
            outcome = RowOutcome(
                id=row.id, line=row.line, state="failed", reason="refused", message=row.reason
            )
        else:
            outcome = await self._outcome(row, row.key)
        self.progress.count(outcome)
        self.progress.spent = self.submitter.spent
        if outcome.state == "failed":
            self.unstored.append((row.cells, outcome))
        return outcome

    async def _outcome(self, row: Row, key: str) -> RowOutcome:
        # Equal rows are paid for once: the second finds what the first has left.
        lock = self._locks.setdefault(key, asyncio.Lock())
        async with lock:
            try:
                finished = self.stored.get(key)
                if finished is not None:
                    return await self._deliver(row, key, finished)
                step: Entry | RowOutcome = await self._ledger.read(key)
                while not isinstance(step, RowOutcome):
                    self.latest[key] = step
                    step = await self._step(row, step)
            except FluxKontextError as error:
                return self._unrecorded(row, key, error)
            except Exception as error:
                # A surprise in one row must not cancel the paid rows beside it.
                logger.exception("Row %s (line %d) met an unforeseen error.", row.id, row.line)
                surprise = FluxKontextError(f"{type(error).__name__}: {error}")
                return self._unrecorded(row, key, surprise)
            return step

    def _unrecorded(self, row: Row, key: str, error: FluxKontextError) -> RowOutcome:
        # The ledger may know more than we do, so the row stays among the unfinished ones.
        last = self.latest.pop(key, None)
        paid = last is not None and last.state is State.ACCEPTED
        return RowOutcome.of(row, key, "outstanding" if paid else "failed", error)

    async def _step(self, row: Row, entry: Entry) -> Entry | RowOutcome:
        """Bring the row one state further, or say what became of it."""
        match entry.state:
            case State.INTENT:
                return await self._settle(row, entry)
            case State.ACCEPTED:
                return await self._collect(row, entry)
            case State.FAILED:
                return await self._after_failure(row, entry)
            case State.STORED if entry.ended is not None:
                return await self._deliver(row, entry.key, Stored.of(entry.ended))
            case _:
                return await self._submit(row, entry)

    async def _submit(self, row: Row, entry: Entry) -> Entry | RowOutcome:
        if not self.submits:
            only = BatchStoppedError("Only what is paid for already is collected.")
            return RowOutcome.of(row, entry.key, "not_submitted", only)
        try:
            return await self.submitter.submit(row, entry)
        except RowTakenError:
            return await self._ledger.read(entry.key)
        except _DOUBTFUL as error:
            self.latest.pop(entry.key, None)  # the ledger knows more than we do
            return self._unknown(row, entry.key, error)
        except LedgerError:
            self._count(stored=False)
            raise
        except FluxKontextError as error:
            if error.fatal:
                self._stop(error)
                return RowOutcome.of(row, entry.key, "not_submitted", error)
            self._count(stored=False)
            return RowOutcome.of(row, entry.key, "failed", error)

    async def _settle(self, row: Row, entry: Entry) -> Entry | RowOutcome:
        entry, gone = await self._ledger.settled(entry)
        if entry.state is not State.INTENT or entry.intent is None:
            return entry
        if self.options.resubmit_unknown and gone:
            given_up = FluxKontextError("Given up to be paid for again.", code=GIVEN_UP)
            return await self._ledger.rejected(entry, given_up, by="person")
        whose = "is gone" if gone else "does not know what came of it"
        lost = ReplyLostError(f"The run that submitted it at {entry.intent.at:%F %T %Z} {whose}.")
        return self._unknown(row, entry.key, lost)

    def _unknown(self, row: Row, key: str, error: FluxKontextError) -> RowOutcome:
        message = (
            f"{error.message} The row may be paid for, so it is not submitted again. Settle it "
            f"with `flux-kontext resolve {self._output} {key}`, or pay again with "
            "--resubmit-unknown."
        )
        told = ReplyLostError(message, task_id=error.task_id, code=error.code)
        return RowOutcome.of(row, key, "unknown", told)

    async def _collect(self, row: Row, entry: Entry) -> Entry | RowOutcome:
        task = entry.task
        self.submitter.outstanding.add(entry.key)
        try:
            result = await wait_until_ended(self._client, task, self.options.cadence)
            images = await persist_result(
                result, self._output, self._http, name=row.id, key=entry.key
            )
            files = [self._output.relative(image.uri) for image in images]
            entry = await self._ledger.stored(entry, files, images)
        except GenerationFailedError as error:
            self._count(stored=False)
            self._ended_now.add(entry.key)
            entry = await self._ledger.failed(entry, error)
            self.submitter.outstanding.discard(entry.key)
            return entry
        except FluxKontextError as error:
            if error.fatal:
                self._stop(error)
            gone = isinstance(error, DownloadError | RefusedError)
            if gone and self._expired(task.submitted_at):
                expired = FluxKontextError(
                    f"The result is gone: it was paid for on {task.submitted_at:%F}, and the "
                    f"service keeps results for {self.options.result_days:g} days. {error}",
                    task_id=task.task_id,
                    code="expired",
                )
                self.submitter.outstanding.discard(entry.key)
                self._ended_now.add(entry.key)
                return await self._ledger.failed(entry, expired)
            return RowOutcome.of(row, entry.key, "outstanding", error, task_id=task.task_id)
        self.submitter.outstanding.discard(entry.key)
        self._ended_now.add(entry.key)
        self._count(stored=True)
        return entry

    def _expired(self, submitted_at: datetime) -> bool:
        return utc_now() - submitted_at > timedelta(days=self.options.result_days)

    async def _after_failure(self, row: Row, entry: Entry) -> Entry | RowOutcome:
        ended = entry.ended
        assert ended is not None  # noqa: S101 - this is what the state says
        new = entry.key in self._ended_now
        again = self.options.retry_failed and not new
        decision = self.options.policy.decide(ended.reason, entry.failures, asked_to_retry=again)
        failure = GenerationFailedError(
            ended.message or "The service gave no reason.",
            task_id=ended.task_id,
            code=ended.reason,
        )
        if decision == "retry" and self.submits:
            return await self._submit(row, entry)
        if decision == "stop" and new:
            self._stop(failure)
        return RowOutcome.of(row, entry.key, "failed", failure)

    async def _deliver(self, row: Row, key: str, stored: Stored) -> RowOutcome:
        uris = await name_stored(stored.files, self._output, name=row.id, key=key)
        return RowOutcome(
            id=row.id,
            line=row.line,
            key=key,
            state="stored",
            task_id=stored.task_id,
            uris=uris,
            already=key not in self._ended_now,
        )

    def _count(self, *, stored: bool) -> None:
        if self._breaker.broken(stored=stored):
            why = "nine of the last ten rows or more have failed, so something is wrong with all"
            self._stop(BatchStoppedError(f"The batch was stopped: {why}."))

    def _stop(self, error: FluxKontextError) -> None:
        if self.submitter.stopped is None:
            logger.error("The batch stops submitting: %s", error)
        self.submitter.stop(error)
