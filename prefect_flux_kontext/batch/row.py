"""The run of single rows, from the ledger's latest state to stored, failed or unknown."""

from __future__ import annotations

import asyncio
import logging
from datetime import timedelta
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from prefect_flux_kontext.batch.collection import PENDING_COLLECTION
from prefect_flux_kontext.batch.policy import Breaker
from prefect_flux_kontext.batch.summary import BatchSummary, DoneRow, RowOutcome
from prefect_flux_kontext.client.polling import wait_until_ended
from prefect_flux_kontext.errors import (
    BatchStoppedError,
    DownloadError,
    FluxKontextError,
    GenerationFailedError,
    LedgerError,
    ReferenceImageError,
    RefusedError,
    ReplyLostError,
    ServiceTroubleError,
    UnreadableReplyError,
)
from prefect_flux_kontext.images.persist import persist_result, place_stored_images
from prefect_flux_kontext.ledger.ledger import RowAlreadyClaimedError
from prefect_flux_kontext.ledger.records import GIVEN_UP, State, Times
from prefect_flux_kontext.manifest.row import RefusedRow, Row
from prefect_flux_kontext.models import utc_now
from prefect_flux_kontext.references.location import non_public_references
from prefect_flux_kontext.telemetry import measure_row, measure_storing

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from prefect_flux_kontext.batch.collection import Deferral
    from prefect_flux_kontext.batch.policy import RowOptions
    from prefect_flux_kontext.batch.submission import Submitter
    from prefect_flux_kontext.callbacks.session import CallbackSession
    from prefect_flux_kontext.client.client import FluxKontextClient
    from prefect_flux_kontext.client.polling import PollingCadence
    from prefect_flux_kontext.client.transport import Connections
    from prefect_flux_kontext.ledger.ledger import Ledger
    from prefect_flux_kontext.ledger.records import Ended, Entry
    from prefect_flux_kontext.ledger.waves import FinishedRow
    from prefect_flux_kontext.models import StoredImage
    from prefect_flux_kontext.report.thumbnails import ThumbnailCollector
    from prefect_flux_kontext.storage.filesystem import OutputFolder

logger = logging.getLogger(__name__)

_UNKNOWN_OUTCOME_ERRORS = (ReplyLostError, ServiceTroubleError, UnreadableReplyError)
"""Errors of a submit after which the service may have accepted it."""

_EXPIRED = "expired"
"""The code of a result that the service no longer keeps."""

_MAX_IMAGES_IN_MEMORY = 64
"""Images that are downloaded, checked or stored at a time; more would only use more memory."""


class RowRunner:
    """Runs rows concurrently, with one client, ledger and connection pool for all.

    Args:
        store: Waits for an accepted row's result and stores its images.
        output: Where images go.
        ledger: The ledger, owned by this run.
        submitter: Pays for rows.
        callbacks: Receives callbacks.
        deferral: Limits how long rows wait for their results.
        options: The user's options.

    Attributes:
        progress: The summary of the rows so far, updated while they run.
        failed: The cells of each row that failed, and its outcome.
        latest: The latest ledger entries of rows in unfinished waves, by row key.
        submits: Whether rows are paid for; else only outstanding rows are collected.
        submitter: Pays for rows.
        callbacks: Receives callbacks.
        deferral: Limits how long rows wait for their results.
        options: The user's options.
    """

    def __init__(
        self,
        store: Callable[[Row, Entry], Awaitable[tuple[list[StoredImage], Times]]],
        output: OutputFolder,
        ledger: Ledger,
        submitter: Submitter,
        callbacks: CallbackSession,
        deferral: Deferral,
        options: RowOptions,
    ) -> None:
        self.progress = BatchSummary(output=str(output))
        self.failed: list[tuple[Mapping[str, str], RowOutcome]] = []
        self.latest: dict[str, Entry] = {}
        self.submits = True
        self.submitter = submitter
        self.callbacks = callbacks
        self.deferral = deferral
        self.options = options
        self._store = store
        self._output = output
        self._ledger = ledger
        self._resolver = UnknownOutcomeResolver(
            ledger, callbacks, submitter, output, resubmit_unknown=options.resubmit_unknown
        )
        self._breaker = Breaker()
        self._ended_in_run: set[str] = set()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def run(
        self,
        rows: Sequence[Row | RefusedRow],
        stored: Mapping[str, FinishedRow],
        row_ended: Callable[[], None],
    ) -> list[DoneRow]:
        """Run rows and return their outcomes; an error of one row does not affect the others.

        Args:
            rows: The rows to run.
            stored: Those of them that earlier runs have stored, by row key.
            row_ended: Called once for each row, when it no longer holds a slot. An unknown row
                may still wait for a callback then.
        """
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(self._run(row, stored, row_ended)) for row in rows]
        return [row.result() for row in running]

    @measure_row
    async def _run(
        self,
        row: Row | RefusedRow,
        stored: Mapping[str, FinishedRow],
        row_ended: Callable[[], None],
    ) -> DoneRow:
        if isinstance(row, RefusedRow):
            done = DoneRow(row, RowOutcome.refused(row), None)
        else:
            done = await self._run_row(row, row.key, stored.get(row.key))
        self.deferral.mark_submitted(row)
        row_ended()
        if isinstance(row, Row):
            while done.outcome.state == "unknown" and self.callbacks.may_be_called(row.key):
                await self.callbacks.wait_for_news(row.key)
                done = await self._run_row(row, row.key, None)
        self.progress.count(done.outcome)
        self.progress.spent = self.submitter.spent
        if done.outcome.state == "failed":
            self.failed.append((row.cells, done.outcome))
        return done

    async def _run_row(self, row: Row, key: str, finished: FinishedRow | None) -> DoneRow:
        # Equal rows are paid for once: the second waits here and finds the first one's records.
        lock = self._locks.setdefault(key, asyncio.Lock())
        entry: Entry | None = None
        if lock.locked():
            self.deferral.mark_submitted(row)
        async with lock:
            try:
                if finished is not None:
                    return DoneRow(row, await self._deliver(row, key, finished.ended), finished)
                step: Entry | RowOutcome = await self._ledger.read(key)
                while not isinstance(step, RowOutcome):
                    self.latest[key] = entry = step
                    step = await self._step(row, step)
            except FluxKontextError as error:
                step = self._end_unrecorded(row, key, error)
            except Exception as error:
                # An unexpected error in one row must not cancel the paid rows of its task group.
                logger.exception("Row %s (line %d): unexpected error.", row.id, row.line)
                unexpected = FluxKontextError(f"{type(error).__name__}: {error}")
                step = self._end_unrecorded(row, key, unexpected)
        return DoneRow(row, step, entry)

    def _end_unrecorded(self, row: Row, key: str, error: FluxKontextError) -> RowOutcome:
        # The ledger may hold a later record than this run has seen, so the row stays unfinished.
        last = self.latest.pop(key, None)
        paid = last is not None and last.state is State.ACCEPTED
        return RowOutcome.of(row, key, "outstanding" if paid else "failed", error)

    async def _step(self, row: Row, entry: Entry) -> Entry | RowOutcome:
        """Advance the row by one state, or return its outcome."""
        match entry.state:
            case State.INTENT:
                return await self._resolver.resolve(row, entry)
            case State.ACCEPTED:
                return await self._collect(row, entry)
            case State.FAILED:
                return await self._handle_failure(row, entry)
            case State.STORED if entry.ended is not None:
                in_run = self.has_ended_in_run(entry)
                if not in_run and await self._is_missing(entry.ended.files):
                    return await self._fetch_again(row, entry)
                return await self._deliver(row, entry.key, entry.ended, in_run=in_run)
            case _:
                return await self._submit(row, entry)

    async def _submit(self, row: Row, entry: Entry) -> Entry | RowOutcome:
        if not self.submits:
            collecting = BatchStoppedError("Not submitted: this run only collects paid results.")
            return RowOutcome.of(row, entry.key, "not_submitted", collecting)
        try:
            return await self.submitter.submit(row, entry)
        except RowAlreadyClaimedError:
            return await self._ledger.read(entry.key)
        except _UNKNOWN_OUTCOME_ERRORS as error:
            self.latest.pop(entry.key, None)  # the ledger has a later record than this entry
            return self._resolver.hold_as_unknown(row, error)
        except LedgerError:
            self._count(stored=False)
            raise
        except FluxKontextError as error:
            if error.fatal:
                self._stop(error)
                return RowOutcome.of(row, entry.key, "not_submitted", error)
            if not isinstance(error, ReferenceImageError):
                # An invalid reference costs nothing and does not concern other rows.
                self._count(stored=False)
            return RowOutcome.of(row, entry.key, "failed", error)

    async def _collect(self, row: Row, entry: Entry) -> Entry | RowOutcome:
        self.submitter.outstanding.add(entry.key)
        try:
            images, times = await self._store(row, entry)
            files = [self._output.relative(image.uri) for image in images]
            entry = await self._ledger.record_stored(entry, files, images, times)
        except GenerationFailedError as error:
            self.callbacks.mark_ended(entry)
            self._count(stored=False)
            self._mark_ended(entry)
            entry = await self._ledger.record_failed(entry, error)
            self.submitter.outstanding.discard(entry.key)
            return entry
        except FluxKontextError as error:
            if error.fatal:
                self._stop(error)
            if error.code == _EXPIRED:
                # Recorded only to pay again: the result may still be there if a clock is wrong.
                if self.submits and self.options.retry_failed:
                    self.submitter.outstanding.discard(entry.key)
                    return await self._ledger.record_failed(entry, error)
                return RowOutcome.of(row, entry.key, "failed", error)
            if error.code != PENDING_COLLECTION and self.submits:
                self._count(stored=False)  # paying goes on in vain if nothing can be stored
            return RowOutcome.of(row, entry.key, "outstanding", error, task_id=entry.task.task_id)
        self.submitter.outstanding.discard(entry.key)
        self._mark_ended(entry)
        self._count(stored=True)
        return entry

    async def _is_missing(self, files: list[str]) -> bool:
        return bool(await asyncio.to_thread(self._output.find_missing, files))

    async def _fetch_again(self, row: Row, entry: Entry) -> RowOutcome:
        """Store images that were removed from the output once more; this costs nothing."""
        assert entry.ended is not None  # noqa: S101 - a stored row has ended
        try:
            images, _ = await self._store(row, entry)
        except FluxKontextError as error:
            lost = FluxKontextError(
                f"The image was stored at {entry.ended.at:%F %T %Z} and has been removed from the "
                f"output. It cannot be fetched again: {error.message}",
                task_id=entry.ended.task_id,
                code=error.code,
            )
            return RowOutcome.of(row, entry.key, "failed", lost)
        stored = entry.ended.model_copy(
            update={"files": [self._output.relative(image.uri) for image in images]}
        )
        return await self._deliver(row, entry.key, stored)

    async def _handle_failure(self, row: Row, entry: Entry) -> Entry | RowOutcome:
        ended = entry.ended
        assert ended is not None  # noqa: S101 - a failed row has ended
        is_new = self.has_ended_in_run(entry)
        decision = self.options.policy.decide(
            ended.reason,
            entry.failures,
            asked_to_retry=self.options.retry_failed and not is_new,
            served=bool(non_public_references(row.request.image_urls)),
        )
        failure = GenerationFailedError(
            ended.message or "The service gave no reason.",
            task_id=ended.task_id,
            code=ended.reason,
        )
        if decision == "retry" and self.submits:
            return await self._submit(row, entry)
        if decision == "stop" and is_new:
            self._stop(failure)
        return RowOutcome.of(row, entry.key, "failed", failure)

    async def _deliver(
        self, row: Row, key: str, stored: Ended, *, in_run: bool = False
    ) -> RowOutcome:
        since = self.options.since
        uris = await place_stored_images(stored.files, self._output, name=row.name, key=key)
        return RowOutcome(
            id=row.id,
            line=row.line,
            style=row.style,
            key=key,
            state="stored",
            task_id=stored.task_id,
            uris=uris,
            already=not in_run and (since is None or stored.at < since),
        )

    def _mark_ended(self, entry: Entry) -> None:
        if not self._is_paid_by_run(entry):
            self._ended_in_run.add(entry.key)

    def has_ended_in_run(self, entry: Entry) -> bool:
        """Whether an ended task ended in this run, which need not be the run that paid for it."""
        return self._is_paid_by_run(entry) or entry.key in self._ended_in_run

    def _is_paid_by_run(self, entry: Entry) -> bool:
        return entry.intent is not None and entry.intent.owner == self._ledger.owner

    def _count(self, *, stored: bool) -> None:
        if self._breaker.record(stored=stored):
            self._stop(
                BatchStoppedError(
                    "The batch was stopped: at least nine of ten recent rows have failed, so the "
                    "cause is common to all."
                )
            )

    def _stop(self, error: FluxKontextError) -> None:
        if self.submitter.stopped is None:
            logger.error("The batch stops submitting: %s", error)
        self.submitter.stop(error)


class UnknownOutcomeResolver:
    """Resolves rows whose latest attempt has an intent and no outcome.

    Args:
        ledger: The ledger, in which other runs record their outcomes.
        callbacks: Receives callbacks, which may name the accepted task.
        submitter: Counts rows that turn out to be accepted.
        output: The batch's output, named in messages.
        resubmit_unknown: Whether to give up attempts whose outcome stays unknown, and pay again.
    """

    def __init__(
        self,
        ledger: Ledger,
        callbacks: CallbackSession,
        submitter: Submitter,
        output: OutputFolder,
        *,
        resubmit_unknown: bool,
    ) -> None:
        self._ledger = ledger
        self._callbacks = callbacks
        self._submitter = submitter
        self._output = output
        self._resubmit = resubmit_unknown

    async def resolve(self, row: Row, entry: Entry) -> Entry | RowOutcome:
        """Find the outcome of the row's submit, or hold the row as unknown.

        Raises:
            LedgerError: The ledger cannot be read or written.
        """
        entry, is_owner_dead = await self._ledger.wait_until_settled(entry)
        if entry.state is not State.INTENT or entry.intent is None:
            return entry
        recovered = await self._callbacks.recover(entry)
        if recovered is not None:
            if entry.intent.owner == self._ledger.owner and recovered.state is State.ACCEPTED:
                self._submitter.count(recovered)
            return recovered
        if self._resubmit and is_owner_dead and not self._callbacks.may_be_called(entry.key):
            given_up = FluxKontextError("Given up to be paid for again.", code=GIVEN_UP)
            return await self._ledger.record_rejected(entry, given_up, by="person")
        problem = "is dead" if is_owner_dead else "recorded no outcome"
        lost = ReplyLostError(
            f"The run that submitted it at {entry.intent.at:%F %T %Z} {problem}."
        )
        return self.hold_as_unknown(row, lost)

    def hold_as_unknown(self, row: Row, error: FluxKontextError) -> RowOutcome:
        """Return the outcome of a row that may or may not have been billed."""
        message = (
            f"{error.message} The row may or may not have been billed, so it is not submitted "
            f"again. Settle it with `flux-kontext resolve {self._output} {row.key}`, or pay again "
            "with --resubmit-unknown."
        )
        unknown = ReplyLostError(message, task_id=error.task_id, code=error.code)
        return RowOutcome.of(row, row.key, "unknown", unknown)


def create_row_storer(
    client: FluxKontextClient,
    http: Connections,
    output: OutputFolder,
    pictures: ThumbnailCollector,
    callbacks: CallbackSession,
    deferral: Deferral,
    cadence: PollingCadence,
    *,
    result_days: float,
    ai_mark: bool,
) -> Callable[[Row, Entry], Awaitable[tuple[list[StoredImage], Times]]]:
    """Create the function that waits for a row's accepted task and stores its images.

    Args:
        client: The client of the service.
        http: The connections for downloads.
        output: Where the images go.
        pictures: Makes thumbnails for the gallery.
        callbacks: Receives callbacks, which end a pause between polls.
        deferral: Limits how long rows wait for their results.
        cadence: When to poll for a task.
        result_days: Days for which the service keeps a result.
        ai_mark: Whether images are marked as made by AI.
    """
    memory_slots = asyncio.Semaphore(_MAX_IMAGES_IN_MEMORY)

    async def store(row: Row, entry: Entry) -> tuple[list[StoredImage], Times]:
        task = entry.task
        ended_at = task.submitted_at
        pictures.request_reference(row.request.image_urls)
        loop = asyncio.get_running_loop()
        try:
            async with deferral.limit_wait(row):
                pauses = callbacks.pauses(entry, cadence)
                result = await wait_until_ended(client, task, cadence, pauses)
            callbacks.mark_ended(entry)
            # The service's time counts: this machine's clock may have been wrong at the submit.
            ended_at = result.completed_at or ended_at
            waited = max(0.0, (utc_now() - task.submitted_at).total_seconds())
            async with memory_slots:
                began = loop.time()
                images = await persist_result(
                    result,
                    output,
                    http,
                    name=row.name,
                    key=entry.key,
                    ai_mark=ai_mark,
                    on_decoded=pictures.create_thumbnail_callback(entry.key),
                )
                downloaded = loop.time() - began
        except (DownloadError, RefusedError) as error:
            if ended_at + timedelta(days=result_days) > utc_now():
                raise
            raise FluxKontextError(
                f"The result has expired: it was paid for on {task.submitted_at:%F}, and the "
                f"service keeps results for {result_days:g} days. {error}",
                task_id=task.task_id,
                code=_EXPIRED,
            ) from None
        return images, Times(result.completed_at, result.generation_seconds, waited, downloaded)

    return measure_storing(store)
