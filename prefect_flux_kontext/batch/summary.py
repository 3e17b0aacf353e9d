"""The outcome of single rows and the summary of a batch, whose size is bounded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, Self

from pydantic import BaseModel, Field

from prefect_flux_kontext.redaction import make_showable

if TYPE_CHECKING:
    from prefect_flux_kontext.errors import FluxKontextError
    from prefect_flux_kontext.ledger.records import Entry
    from prefect_flux_kontext.ledger.waves import FinishedRow
    from prefect_flux_kontext.manifest.row import RefusedRow, Row

_MAX_FAILURES = 100
"""Rows that a summary lists, so that its size does not grow with the batch."""

RowState = Literal["stored", "failed", "unknown", "outstanding", "not_submitted"]


class RowOutcome(BaseModel):
    """The outcome of one row in this run."""

    id: str
    line: int
    style: str | None = None
    state: RowState
    key: str | None = Field(default=None, description="The row key, which names it in the ledger.")
    reason: str | None = Field(
        default=None, description="The service's code or the error's name, for counting."
    )
    message: str | None = Field(default=None, description="What happened, in words.")
    task_id: str | None = Field(default=None, description="The paid task, if there is one.")
    uris: list[str] = Field(default_factory=list, description="Where its images are stored.")
    already: bool = Field(default=False, description="Whether it was stored before this run.")

    @property
    def label(self) -> str:
        """The row's id, with its style if it has one."""
        return make_showable(f"{self.id} ({self.style})" if self.style else self.id)

    @classmethod
    def refused(cls, row: RefusedRow) -> Self:
        """Make the outcome of an invalid row, which is never submitted."""
        return cls(
            id=row.id,
            line=row.line,
            style=row.cells.get("style") or None,
            state="failed",
            reason="refused",
            message=row.reason,
        )

    @classmethod
    def of(
        cls,
        row: Row,
        key: str,
        state: RowState,
        error: FluxKontextError,
        *,
        task_id: str | None = None,
    ) -> Self:
        """Make the outcome of a row that is not stored because of an error."""
        return cls(
            id=row.id,
            line=row.line,
            style=row.style,
            key=key,
            state=state,
            reason=error.reason,
            message=error.message,
            task_id=task_id or error.task_id,
        )


class DoneRow(NamedTuple):
    """A row, its outcome, and its ledger entry where known."""

    row: Row | RefusedRow
    outcome: RowOutcome
    record: Entry | FinishedRow | None


class BatchSummary(BaseModel):
    """The number of rows by outcome, the reasons of failures, and the dollars spent."""

    output: str = Field(default="", description="Where the images are.")
    rows: int = Field(default=0, description="Rows processed.")
    stored: int = Field(default=0, description="Rows whose images are all stored.")
    already_stored: int = Field(
        default=0, description="Stored rows that were stored before this run."
    )
    failed: int = Field(default=0, description="Rows that failed, including refused rows.")
    unknown: int = Field(
        default=0,
        description="Rows that may or may not have been billed, because the submit's reply was "
        "lost.",
    )
    outstanding: int = Field(default=0, description="Rows paid for and not yet stored.")
    not_submitted: int = Field(default=0, description="Rows left when the batch was stopped.")
    spent: float = Field(default=0.0, description="Dollars for what was accepted in this run.")
    reasons: dict[str, int] = Field(
        default_factory=dict, description="Number of rows that are not stored, by reason."
    )
    failures: list[RowOutcome] = Field(
        default_factory=list,
        description="The first hundred rows that failed, are unknown or outstanding.",
    )
    seconds: float = Field(default=0.0, description="Duration of the run.")

    @property
    def complete(self) -> bool:
        """Whether every row is stored."""
        return self.stored == self.rows

    def count(self, outcome: RowOutcome) -> Self:
        """Add the outcome of one row."""
        self.rows += 1
        setattr(self, outcome.state, getattr(self, outcome.state) + 1)
        self.already_stored += outcome.already
        if outcome.state in ("failed", "unknown", "outstanding"):
            reason = outcome.reason or "no reason given"
            self.reasons[reason] = self.reasons.get(reason, 0) + 1
            if len(self.failures) < _MAX_FAILURES:
                self.failures.append(outcome)
        return self

    def add(self, other: BatchSummary) -> Self:
        """Add the counts, reasons and failures of another summary."""
        for name in (
            "rows",
            "stored",
            "already_stored",
            "failed",
            "unknown",
            "outstanding",
            "not_submitted",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for reason, number in other.reasons.items():
            self.reasons[reason] = self.reasons.get(reason, 0) + number
        self.failures += other.failures[: _MAX_FAILURES - len(self.failures)]
        return self

    def __str__(self) -> str:
        parts = [f"{self.stored} of {self.rows} rows stored"]
        if self.already_stored:
            parts[0] += f", {self.already_stored} of them before this run"
        for number, label in (
            (self.failed, "failed"),
            (self.unknown, "unknown (may be paid for)"),
            (self.outstanding, "outstanding (paid for, not yet stored)"),
            (self.not_submitted, "not submitted"),
        ):
            if number:
                parts.append(f"{number} {label}")
        if self.reasons:
            reasons = sorted(self.reasons.items(), key=lambda item: -item[1])
            parts.append("why: " + ", ".join(f"{reason} {number}" for reason, number in reasons))
        if self.spent:
            parts.append(f"${self.spent:.2f} spent")
        if self.seconds:
            parts.append(f"{self.seconds:.1f} s")
            if rate := (self.stored - self.already_stored) / self.seconds:
                parts[-1] += f", {rate:.{1 if rate >= 1 else 2}f} images a second"
        return "; ".join(parts)
