"""Lines of the result manifest, made from a row's outcome or from the ledger."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prefect_flux_kontext.batch.spending import REQUEST_COLUMNS
from prefect_flux_kontext.batch.summary import DoneRow, RowOutcome
from prefect_flux_kontext.ledger.records import Entry, State
from prefect_flux_kontext.ledger.waves import FinishedRow
from prefect_flux_kontext.manifest.row import Row
from prefect_flux_kontext.models import utc_now
from prefect_flux_kontext.redaction import redact_text, redact_url
from prefect_flux_kontext.report.line_index import hash_content
from prefect_flux_kontext.report.results import COLUMNS, extract_custom_columns
from prefect_flux_kontext.storage.names import make_safe_name

if TYPE_CHECKING:
    from datetime import datetime

    from prefect_flux_kontext.batch.session import Session
    from prefect_flux_kontext.models import GenerationRequest
    from prefect_flux_kontext.report.results import Line
    from prefect_flux_kontext.storage.filesystem import OutputFolder

_SHOWN_STATES = frozenset({State.ACCEPTED, State.STORED, State.FAILED})


def line_from_outcome(session: Session, done: DoneRow) -> Line:
    """Return the line of a row, without anything that authorizes access to a reference.

    Args:
        session: The batch of the row.
        done: The row and its outcome.
    """
    owner, flow_run_id = session.ledger.owner, session.flow_run_id
    return _build_line(done, session.output, owner, flow_run_id)


def line_from_records(output: OutputFolder, entry: Entry) -> Line | None:
    """Return the line of a row that a run may be working on, from its records alone.

    Returns:
        The line of an accepted, stored or failed row; None for any other.
    """
    if entry.intent is None or entry.state not in _SHOWN_STATES:
        return None
    owner = entry.intent.owner
    if entry.ended is not None:
        return _build_line(_done_row(output, entry), output, owner, None, entry.ended.at)
    row, task = row_from_entry(entry), entry.task
    outcome = RowOutcome(
        id=row.id, line=row.line, key=entry.key, state="outstanding", task_id=task.task_id
    )
    return _build_line(DoneRow(row, outcome, entry), output, owner, None, task.submitted_at)


def _build_line(
    done: DoneRow,
    output: OutputFolder,
    run: str,
    flow_run_id: str | None,
    at: datetime | None = None,
) -> Line:
    row, outcome, _ = done
    line: Line = {
        **outcome.model_dump(include={"id", "line", "state", "reason", "message", "task_id"}),
        **_ledger_columns(done),
        "uri": outcome.uris[0] if outcome.uris else None,
        "uris": outcome.uris or None,
        "file": output.relative(outcome.uris[0]) if outcome.uris else None,
        "stored_before": outcome.already,
        "style": row.style if isinstance(row, Row) else row.cells.get("style"),
        "key": outcome.key,
        "run": run,
        "flow_run_id": flow_run_id,
        # A collected row has no manifest columns: the ledger does not hold them.
        "source": "manifest" if row.cells else "ledger",
        "recorded_at": _format_timestamp(at or utc_now()),
    }
    if isinstance(row, Row):
        line["variant_number"] = row.variant
        line |= {name: getattr(row.request, name) for name in REQUEST_COLUMNS}
        line["reference_images"] = [redact_url(url) for url in row.request.image_urls] or None
    line = {name: line.get(name) for name in COLUMNS} | extract_custom_columns(row.cells)
    return {name: _sanitize(value) for name, value in line.items() if value not in (None, "")}


def compute_stored_digest(row: Row, uris: list[str]) -> int:
    """Return the digest of the line of a stored row, without making the line."""
    custom = extract_custom_columns(row.cells)
    return hash_content(
        "stored",
        "manifest" if row.cells else "ledger",
        _sanitize(row.id),
        _sanitize(row.style),
        row.variant,
        row.key,
        uris,
        {name: _sanitize(text) for name, text in custom.items() if text},
    )


def row_from_entry(entry: Entry) -> Row:
    """Return a row as the ledger has it, without its custom columns."""
    intent = entry.intent
    assert intent is not None  # noqa: S101 - every paid row has one
    return Row(
        id=intent.row_id,
        line=intent.line,
        values=intent.request,
        key=entry.key,
        name=intent.name or make_safe_name(intent.row_id),
        style=intent.style,
        variant=intent.variant,
    )


def line_from_entry(session: Session, entry: Entry) -> Line:
    """Return the line of a row that has ended in any run, from the ledger alone."""
    already = entry.state is State.STORED and not session.has_ended_in_run(entry)
    return line_from_outcome(session, _done_row(session.output, entry, already=already))


def _done_row(output: OutputFolder, entry: Entry, *, already: bool = False) -> DoneRow:
    row, ended = row_from_entry(entry), entry.ended
    assert ended is not None  # noqa: S101 - the caller passes ended rows only
    outcome = RowOutcome(
        id=row.id,
        line=row.line,
        key=entry.key,
        state=ended.state,
        reason=ended.reason,
        message=ended.message,
        task_id=ended.task_id,
        uris=[output.uri(file) for file in ended.files],
        already=already,
    )
    return DoneRow(row, outcome, entry)


def _ledger_columns(done: DoneRow) -> Line:
    """Return the columns that come from the ledger: cost, times and the first image."""
    _, outcome, record = done
    if record is None:
        return {}
    ended = record.ended
    submitted = ended.submitted_at if ended else None
    if outcome.state == "outstanding" and isinstance(record, Entry):
        submitted = record.task.submitted_at
    sent: FinishedRow | GenerationRequest | None = None
    if isinstance(record, FinishedRow):
        sent = record
    elif record.intent is not None:
        sent = record.intent.request
    line: Line = {
        "attempts": record.attempt,
        "cost_usd": round(record.spent, 6),
        "submitted_at": _format_timestamp(submitted),
        "matched_ratio": sent and sent.matched_ratio,
        "match_note": sent and sent.match_note,
    }
    if ended is None or outcome.state != ended.state:
        return line
    line |= {
        "finished_at": _format_timestamp(ended.at),
        "waiting_seconds": _round_seconds(ended.waiting_seconds),
        "generation_seconds": _round_seconds(ended.generation_seconds),
        "download_seconds": _round_seconds(ended.download_seconds),
    }
    if ended.images:
        first = ended.images[0]
        line |= first.model_dump(include={"sha256", "width", "height", "format"})
        line["bytes"] = first.size
        line["check_flags"] = first.flags or None
    return line


def _sanitize(value: Any) -> Any:
    """Make text valid UTF-8 and strip signatures from its URLs; other values stay as they are."""
    if not isinstance(value, str):
        return value
    return redact_text(value if value.isascii() else value.encode(errors="replace").decode())


def _format_timestamp(at: datetime | None) -> str | None:
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z") if at else None


def _round_seconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)
