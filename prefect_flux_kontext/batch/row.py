"""The run of single rows: one transition for each state, until the row has an outcome."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, TypeAlias

from prefect_flux_kontext.batch.deferral import PENDING_COLLECTION
from prefect_flux_kontext.batch.storing import EXPIRED, store_result
from prefect_flux_kontext.batch.summary import DoneRow, RowOutcome, get_row_name
from prefect_flux_kontext.errors import (
    BatchStoppedError,
    FluxKontextError,
    GenerationFailedError,
    GroupBudgetReachedError,
    LedgerError,
    ReferenceImageError,
    ReplyLostError,
    ServiceTroubleError,
    UnreadableReplyError,
)
from prefect_flux_kontext.images.persist import place_stored_images
from prefect_flux_kontext.ledger.ledger import RowAlreadyClaimedError
from prefect_flux_kontext.ledger.records import GIVEN_UP, State
from prefect_flux_kontext.manifest.row import RefusedRow, Row
from prefect_flux_kontext.references.location import non_public_references
from prefect_flux_kontext.telemetry import measure_row

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from prefect_flux_kontext.batch.session import Session
    from prefect_flux_kontext.ledger.records import Ended, Entry
    from prefect_flux_kontext.ledger.waves import FinishedRow

logger = logging.getLogger(__name__)

_UNKNOWN_OUTCOME_ERRORS = (ReplyLostError, ServiceTroubleError, UnreadableReplyError)
"""Errors of a submit after which the service may have accepted it."""

_Transition: TypeAlias = "Callable[[Session, Row, Entry], Awaitable[Entry | RowOutcome]]"


async def run_rows(
    session: Session,
    rows: Sequence[Row | RefusedRow],
    stored: Mapping[str, FinishedRow],
    row_ended: Callable[[], None],
) -> list[DoneRow]:
    """Run rows concurrently; an error of one row does not affect the others.

    Args:
        session: The batch.
        rows: The rows to run.
        stored: Those of them that earlier runs have stored, by row key.
        row_ended: Called once for each row, when it no longer holds a slot. An unknown row may
            still wait for a callback then.

    Returns:
        Their outcomes, in order.
    """
    async with asyncio.TaskGroup() as group:
        running = [group.create_task(_run(session, row, stored, row_ended)) for row in rows]
    return [row.result() for row in running]


@measure_row
async def _run(
    session: Session,
    row: Row | RefusedRow,
    stored: Mapping[str, FinishedRow],
    row_ended: Callable[[], None],
) -> DoneRow:
    if isinstance(row, RefusedRow):
        done = DoneRow(row, RowOutcome.refused(row), None)
    else:
        done = await _run_to_outcome(session, row, stored.get(row.key))
    session.deferral.mark_submitted(row)
    row_ended()
    if isinstance(row, Row):
        while done.outcome.state == "unknown" and session.callbacks.may_be_called(row.key):
            await session.callbacks.wait_for_news(row.key)
            done = await _run_to_outcome(session, row, None)
    session.progress.count(done.outcome)
    session.progress.spent = session.submitter.spent
    if done.outcome.state == "failed":
        session.failed.append((row.cells, done.outcome))
    elif done.outcome.state == "not_submitted":
        session.run_again.discard(get_row_name(row.id, row.cells))
    return done


async def _run_to_outcome(session: Session, row: Row, finished: FinishedRow | None) -> DoneRow:
    # Equal rows are paid for once: the second waits here and finds the first one's records.
    lock = session.locks.setdefault(row.key, asyncio.Lock())
    if lock.locked():
        session.deferral.mark_submitted(row)
    entry: Entry | None = None
    async with lock:
        try:
            if finished is not None:
                return DoneRow(row, await _deliver(session, row, finished.ended), finished)
            step: Entry | RowOutcome = await session.ledger.read(row.key)
            while not isinstance(step, RowOutcome):
                session.latest[row.key] = entry = step
                step = await _TRANSITIONS[entry.state](session, row, entry)
        except FluxKontextError as error:
            step = _end_unrecorded(session, row, error)
        except Exception as error:
            # An unexpected error in one row must not cancel the paid rows of its task group.
            logger.exception("Row %s (line %d): unexpected error.", row.id, row.line)
            unexpected = FluxKontextError(f"{type(error).__name__}: {error}")
            step = _end_unrecorded(session, row, unexpected)
    return DoneRow(row, step, entry)


def _end_unrecorded(session: Session, row: Row, error: FluxKontextError) -> RowOutcome:
    # The ledger may hold a later record than this run has seen, so the row stays unfinished.
    last = session.latest.pop(row.key, None)
    paid = last is not None and last.state is State.ACCEPTED
    return RowOutcome.of(row, row.key, "outstanding" if paid else "failed", error)


async def _submit(session: Session, row: Row, entry: Entry) -> Entry | RowOutcome:
    if not session.submits:
        collecting = BatchStoppedError("Not submitted: this run only collects paid results.")
        return RowOutcome.of(row, row.key, "not_submitted", collecting)
    try:
        return await session.submitter.submit(row, entry)
    except RowAlreadyClaimedError:
        return await session.ledger.read(row.key)
    except _UNKNOWN_OUTCOME_ERRORS as error:
        session.latest.pop(row.key, None)  # the ledger has a later record than this entry
        return _hold_as_unknown(session, row, error)
    except LedgerError:
        _count(session, stored=False)
        raise
    except FluxKontextError as error:
        if error.fatal:
            _stop(session, error)
        if error.fatal or isinstance(error, GroupBudgetReachedError):
            return RowOutcome.of(row, row.key, "not_submitted", error)
        if not isinstance(error, ReferenceImageError):
            # An invalid reference costs nothing and does not concern other rows.
            _count(session, stored=False)
        return RowOutcome.of(row, row.key, "failed", error)


async def _find_outcome(session: Session, row: Row, entry: Entry) -> Entry | RowOutcome:
    """Find the outcome of a submit that has only an intent, or hold the row as unknown."""
    entry, is_owner_dead = await session.ledger.wait_until_settled(entry)
    if entry.state is not State.INTENT or entry.intent is None:
        return entry
    recovered = await session.callbacks.recover(entry)
    if recovered is not None:
        if entry.intent.owner == session.ledger.owner and recovered.state is State.ACCEPTED:
            session.submitter.count(recovered)
        return recovered
    is_final = is_owner_dead and not session.callbacks.may_be_called(row.key)
    if session.options.resubmit_unknown and is_final:
        given_up = FluxKontextError("Given up to be paid for again.", code=GIVEN_UP)
        return await session.ledger.record_rejected(entry, given_up, by="person")
    problem = "is dead" if is_owner_dead else "recorded no outcome"
    lost = ReplyLostError(f"The run that submitted it at {entry.intent.at:%F %T %Z} {problem}.")
    return _hold_as_unknown(session, row, lost)


def _hold_as_unknown(session: Session, row: Row, error: FluxKontextError) -> RowOutcome:
    message = (
        f"{error.message} The row may or may not have been billed, so it is not submitted "
        f"again. Settle it with `flux-kontext resolve {session.output} {row.key}`, or pay again "
        "with --resubmit-unknown."
    )
    unknown = ReplyLostError(message, task_id=error.task_id, code=error.code)
    return RowOutcome.of(row, row.key, "unknown", unknown)


async def _collect(session: Session, row: Row, entry: Entry) -> Entry | RowOutcome:
    session.submitter.outstanding.add(row.key)
    try:
        images, times = await store_result(session, row, entry)
        files = [session.output.relative(image.uri) for image in images]
        entry = await session.ledger.record_stored(entry, files, images, times)
    except GenerationFailedError as error:
        session.callbacks.mark_ended(entry)
        session.mark_ended(entry)
        _count(session, stored=False)
        entry = await session.ledger.record_failed(entry, error)
        session.submitter.outstanding.discard(row.key)
        return entry
    except FluxKontextError as error:
        if error.fatal:
            _stop(session, error)
        if error.code == EXPIRED:
            # Recorded only to pay again: the result may still be there if a clock is wrong.
            if session.submits and session.options.retry_failed:
                session.submitter.outstanding.discard(row.key)
                return await session.ledger.record_failed(entry, error)
            return RowOutcome.of(row, row.key, "failed", error)
        if error.code != PENDING_COLLECTION and session.submits:
            _count(session, stored=False)  # paying goes on in vain if nothing can be stored
        return RowOutcome.of(row, row.key, "outstanding", error, task_id=entry.task.task_id)
    session.submitter.outstanding.discard(row.key)
    session.mark_ended(entry)
    _count(session, stored=True)
    return entry


async def _handle_failure(session: Session, row: Row, entry: Entry) -> Entry | RowOutcome:
    ended = entry.ended
    assert ended is not None  # noqa: S101 - a failed row has ended
    is_new = session.has_ended_in_run(entry)
    decision = session.options.policy.decide(
        ended.reason,
        entry.failures,
        asked_to_retry=session.options.retry_failed and not is_new,
        served=bool(non_public_references(row.request.image_urls)),
    )
    if decision == "retry" and session.submits:
        return await _submit(session, row, entry)
    failure = GenerationFailedError(
        ended.message or "The service gave no reason.", task_id=ended.task_id, code=ended.reason
    )
    if decision == "stop" and is_new:
        _stop(session, failure)
    return RowOutcome.of(row, row.key, "failed", failure)


async def _check_images(session: Session, row: Row, entry: Entry) -> RowOutcome:
    """Deliver a stored row; store images that were removed once more, which costs nothing."""
    stored = entry.ended
    assert stored is not None  # noqa: S101 - a stored row has ended
    if session.has_ended_in_run(entry):
        return await _deliver(session, row, stored, in_run=True)
    if await asyncio.to_thread(session.output.find_missing, stored.files):
        try:
            images, _ = await store_result(session, row, entry)
        except FluxKontextError as error:
            lost = FluxKontextError(
                f"The image was stored at {stored.at:%F %T %Z} and has been removed from the "
                f"output. It cannot be fetched again: {error.message}",
                task_id=stored.task_id,
                code=error.code,
            )
            return RowOutcome.of(row, row.key, "failed", lost)
        files = [session.output.relative(image.uri) for image in images]
        stored = stored.model_copy(update={"files": files})
    return await _deliver(session, row, stored)


async def _deliver(
    session: Session, row: Row, stored: Ended, *, in_run: bool = False
) -> RowOutcome:
    since = session.options.since
    uris = await place_stored_images(stored.files, session.output, name=row.name, key=row.key)
    return RowOutcome(
        id=row.id,
        line=row.line,
        style=row.style,
        key=row.key,
        state="stored",
        task_id=stored.task_id,
        uris=uris,
        flags=stored.flags,
        already=not in_run and (since is None or stored.at < since),
    )


def _count(session: Session, *, stored: bool) -> None:
    if session.breaker.record(stored=stored):
        _stop(
            session,
            BatchStoppedError(
                "The batch was stopped: at least nine of ten recent rows have failed, so the "
                "cause is common to all."
            ),
        )


def _stop(session: Session, error: FluxKontextError) -> None:
    if session.submitter.stopped is None:
        logger.error("The batch stops submitting: %s", error)
    session.submitter.stop(error)


_TRANSITIONS: dict[State, _Transition] = {
    State.PLANNED: _submit,
    State.INTENT: _find_outcome,
    State.REJECTED: _submit,
    State.ACCEPTED: _collect,
    State.FAILED: _handle_failure,
    State.STORED: _check_images,
}
"""What a run does for a row in each state that an entry can have."""
