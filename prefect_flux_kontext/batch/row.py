"""Rows whose submit's reply was lost: settled by a callback or a person, else held as unknown."""

from __future__ import annotations

import asyncio
import logging
from datetime import timedelta
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

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


class UnknownOutcomeResolver:
    """Settles rows whose latest attempt has an intent and no outcome.

    Args:
        ledger: Where other runs write what theirs came to.
        called: What callbacks say.
        submitter: Counts what is found to be accepted.
        output: The batch's output, to tell a person about.
        resubmit_unknown: Give an attempt up where nothing more can be learned of it.
    """

    def __init__(
        self,
        ledger: Ledger,
        called: CallbackSession,
        submitter: Submitter,
        output: OutputFolder,
        *,
        resubmit_unknown: bool,
    ) -> None:
        self._ledger = ledger
        self._called = called
        self._submitter = submitter
        self._output = output
        self._resubmit = resubmit_unknown

    async def settle(self, row: Row, entry: Entry) -> Entry | RowOutcome:
        """What the row came to, or that nobody can tell so far.

        Raises:
            LedgerError: The ledger cannot be read or written.
        """
        entry, gone = await self._ledger.wait_until_settled(entry)
        if entry.state is not State.INTENT or entry.intent is None:
            return entry
        adopted = await self._called.adopted(entry)
        if adopted is not None:
            if entry.intent.owner == self._ledger.owner and adopted.state is State.ACCEPTED:
                self._submitter.count(adopted)
            return adopted
        if self._resubmit and gone and not self._called.may_be_called(entry.key):
            given_up = FluxKontextError("Given up to be paid for again.", code=GIVEN_UP)
            return await self._ledger.rejected(entry, given_up, by="person")
        whose = "is gone" if gone else "does not know what came of it"
        lost = ReplyLostError(f"The run that submitted it at {entry.intent.at:%F %T %Z} {whose}.")
        return self.unknown(row, lost)

    def unknown(self, row: Row, error: FluxKontextError) -> RowOutcome:
        """The outcome of a row of which nobody can tell whether it is paid for."""
        message = (
            f"{error.message} The row may be paid for, so it is not submitted again. Settle it "
            f"with `flux-kontext resolve {self._output} {row.key}`, or pay again with "
            "--resubmit-unknown."
        )
        told = ReplyLostError(message, task_id=error.task_id, code=error.code)
        return RowOutcome.of(row, row.key, "unknown", told)


_IMAGES_IN_HAND = 64
"""Images that are downloaded, checked or stored at once: more would only fill the memory."""


def create_row_storer(
    client: FluxKontextClient,
    http: Connections,
    output: OutputFolder,
    pictures: ThumbnailCollector,
    called: CallbackSession,
    deferral: Deferral,
    cadence: PollingCadence,
    *,
    ai_mark: bool,
) -> Callable[[Row, Entry], Awaitable[tuple[list[StoredImage], Times]]]:
    """What waits for a row's accepted task to end and stores its images.

    Args:
        client: The service.
        http: For downloads.
        output: Where the images go.
        pictures: Keeps small ones for the gallery.
        called: Tells what callbacks say.
        deferral: Ends waits that are left to be collected.
        cadence: When to ask how a task is doing.
        ai_mark: Whether images are marked as made by AI.
    """
    room = asyncio.Semaphore(_IMAGES_IN_HAND)

    async def store(row: Row, entry: Entry) -> tuple[list[StoredImage], Times]:
        task = entry.task
        pictures.want_references(row.request.image_urls)
        async with deferral.waiting(row):
            result = await wait_until_ended(client, task, cadence, called.pauses(entry, cadence))
        called.ended(entry)
        waited = max(0.0, (utc_now() - task.submitted_at).total_seconds())
        loop = asyncio.get_running_loop()
        async with room:
            began = loop.time()
            images = await persist_result(
                result,
                output,
                http,
                name=row.name,
                key=entry.key,
                ai_mark=ai_mark,
                show=pictures.showing(entry.key),
            )
            downloaded = loop.time() - began
        return images, Times(result.completed_at, result.generation_seconds, waited, downloaded)

    return store


logger = logging.getLogger(__name__)

_DOUBTFUL = (ReplyLostError, ServiceTroubleError, UnreadableReplyError)


class RowRunner:
    """Runs rows side by side, with one client, ledger and connection pool for all.

    Args:
        store: Waits for an accepted row and stores its images.
        output: Where images go.
        ledger: Where it stands what was paid for.
        submitter: Pays.
        called: Tells what callbacks say.
        deferral: Lets rows wait for their results, or leaves these to be collected.
        options: What a person has decided.

    Attributes:
        progress: What became of the rows so far; it moves while they run.
        unstored: The lines of rows that failed, with what became of them.
        latest: Where the ledger says that the rows of unfinished waves stand, by row key.
        submits: Whether rows are paid for, or only what is paid for already is collected.
    """

    def __init__(
        self,
        store: Callable[[Row, Entry], Awaitable[tuple[list[StoredImage], Times]]],
        output: OutputFolder,
        ledger: Ledger,
        submitter: Submitter,
        called: CallbackSession,
        deferral: Deferral,
        options: RowOptions,
    ) -> None:
        self.progress = BatchSummary(output=str(output))
        self.unstored: list[tuple[Mapping[str, str], RowOutcome]] = []
        self.latest: dict[str, Entry] = {}
        self.submits = True
        self.submitter = submitter
        self._store = store
        self.called = called
        self._output = output
        self._ledger = ledger
        self.options = options
        self._doubtful = UnknownOutcomeResolver(
            ledger, called, submitter, output, resubmit_unknown=options.resubmit_unknown
        )
        self.deferral = deferral
        self._breaker = Breaker()
        self._collected: set[str] = set()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def run(
        self,
        rows: Sequence[Row | RefusedRow],
        stored: Mapping[str, FinishedRow],
        row_ended: Callable[[], None],
    ) -> list[DoneRow]:
        """Run rows and tell what became of them; a bad row fails alone.

        Args:
            rows: What is to be done.
            stored: Those of them that earlier runs have stored, by row key.
            row_ended: Called once for each row, when it holds no slot any more: it may still
                wait to be called back about a submit whose reply was lost.
        """
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(self._run(row, stored, row_ended)) for row in rows]
        return [row.result() for row in running]

    async def _run(
        self,
        row: Row | RefusedRow,
        stored: Mapping[str, FinishedRow],
        row_ended: Callable[[], None],
    ) -> DoneRow:
        if isinstance(row, RefusedRow):
            done = DoneRow(row, RowOutcome.refused(row), None)
        else:
            done = await self._done(row, row.key, stored.get(row.key))
        self.deferral.submitted(row)
        row_ended()
        if isinstance(row, Row):
            while done.outcome.state == "unknown" and self.called.may_be_called(row.key):
                await self.called.news(row.key)
                done = await self._done(row, row.key, None)
        self.progress.count(done.outcome)
        self.progress.spent = self.submitter.spent
        if done.outcome.state == "failed":
            self.unstored.append((row.cells, done.outcome))
        return done

    async def _done(self, row: Row, key: str, finished: FinishedRow | None) -> DoneRow:
        # Equal rows are paid for once: the second finds what the first has left.
        lock = self._locks.setdefault(key, asyncio.Lock())
        entry: Entry | None = None
        if lock.locked():
            self.deferral.submitted(row)
        async with lock:
            try:
                if finished is not None:
                    return DoneRow(row, await self._deliver(row, key, finished.ended), finished)
                step: Entry | RowOutcome = await self._ledger.read(key)
                while not isinstance(step, RowOutcome):
                    self.latest[key] = entry = step
                    step = await self._step(row, step)
            except FluxKontextError as error:
                step = self._unrecorded(row, key, error)
            except Exception as error:
                # A surprise in one row must not cancel the paid rows beside it.
                logger.exception("Row %s (line %d) met an unforeseen error.", row.id, row.line)
                told = FluxKontextError(f"{type(error).__name__}: {error}")
                step = self._unrecorded(row, key, told)
        return DoneRow(row, step, entry)

    def _unrecorded(self, row: Row, key: str, error: FluxKontextError) -> RowOutcome:
        # The ledger may know more than we do, so the row stays among the unfinished ones.
        last = self.latest.pop(key, None)
        paid = last is not None and last.state is State.ACCEPTED
        return RowOutcome.of(row, key, "outstanding" if paid else "failed", error)

    async def _step(self, row: Row, entry: Entry) -> Entry | RowOutcome:
        """Bring the row one state further, or say what became of it."""
        match entry.state:
            case State.INTENT:
                return await self._doubtful.settle(row, entry)
            case State.ACCEPTED:
                return await self._collect(row, entry)
            case State.FAILED:
                return await self._after_failure(row, entry)
            case State.STORED if entry.ended is not None:
                return await self._deliver(row, entry.key, entry.ended, now=self.ended_now(entry))
            case _:
                return await self._submit(row, entry)

    async def _submit(self, row: Row, entry: Entry) -> Entry | RowOutcome:
        if not self.submits:
            only = BatchStoppedError("Only what is paid for already is collected.")
            return RowOutcome.of(row, entry.key, "not_submitted", only)
        try:
            return await self.submitter.submit(row, entry)
        except RowAlreadyClaimedError:
            return await self._ledger.read(entry.key)
        except _DOUBTFUL as error:
            self.latest.pop(entry.key, None)  # the ledger knows more than we do
            return self._doubtful.unknown(row, error)
        except LedgerError:
            self._count(stored=False)
            raise
        except FluxKontextError as error:
            if error.fatal:
                self._stop(error)
                return RowOutcome.of(row, entry.key, "not_submitted", error)
            if not isinstance(error, ReferenceImageError):
                # A bad image has cost nothing, and says nothing of the other rows.
                self._count(stored=False)
            return RowOutcome.of(row, entry.key, "failed", error)

    async def _collect(self, row: Row, entry: Entry) -> Entry | RowOutcome:
        task = entry.task
        self.submitter.outstanding.add(entry.key)
        try:
            images, times = await self._store(row, entry)
            files = [self._output.relative(image.uri) for image in images]
            entry = await self._ledger.stored(entry, files, images, times)
        except GenerationFailedError as error:
            self.called.ended(entry)
            self._count(stored=False)
            self._note_end(entry)
            entry = await self._ledger.failed(entry, error)
            self.submitter.outstanding.discard(entry.key)
            return entry
        except FluxKontextError as error:
            if error.fatal:
                self._stop(error)
            gone = isinstance(error, DownloadError | RefusedError)
            if gone and task.submitted_at + timedelta(days=self.options.result_days) < utc_now():
                expired = FluxKontextError(
                    f"The result is gone: it was paid for on {task.submitted_at:%F}, and the "
                    f"service keeps results for {self.options.result_days:g} days. {error}",
                    task_id=task.task_id,
                    code="expired",
                )
                self.submitter.outstanding.discard(entry.key)
                self._note_end(entry)
                return await self._ledger.failed(entry, expired)
            return RowOutcome.of(row, entry.key, "outstanding", error, task_id=task.task_id)
        self.submitter.outstanding.discard(entry.key)
        self._note_end(entry)
        self._count(stored=True)
        return entry

    async def _after_failure(self, row: Row, entry: Entry) -> Entry | RowOutcome:
        ended = entry.ended
        assert ended is not None  # noqa: S101 - this is what the state says
        new = self.ended_now(entry)
        again = self.options.retry_failed and not new
        decision = self.options.policy.decide(
            ended.reason,
            entry.failures,
            asked_to_retry=again,
            served=bool(non_public_references(row.request.image_urls)),
        )
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

    async def _deliver(
        self, row: Row, key: str, stored: Ended, *, now: bool = False
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
            already=not now and (since is None or stored.at < since),
        )

    def _note_end(self, entry: Entry) -> None:
        if not self._is_ours(entry):
            self._collected.add(entry.key)

    def ended_now(self, entry: Entry) -> bool:
        """Whether a task that has ended did so in this run, which may not be the run that paid."""
        return self._is_ours(entry) or entry.key in self._collected

    def _is_ours(self, entry: Entry) -> bool:
        return entry.intent is not None and entry.intent.owner == self._ledger.owner

    def _count(self, *, stored: bool) -> None:
        if self._breaker.broken(stored=stored):
            why = "nine of the last ten rows or more have failed, so something is wrong with all"
            self._stop(BatchStoppedError(f"The batch was stopped: {why}."))

    def _stop(self, error: FluxKontextError) -> None:
        if self.submitter.stopped is None:
            logger.error("The batch stops submitting: %s", error)
        self.submitter.stop(error)
