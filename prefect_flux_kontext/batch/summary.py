"""What became of a batch, counted; small enough to pass around whatever the batch's size."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, Field

_FAILURES_KEPT = 100


class RowOutcome(BaseModel):
    """What became of one row."""

    id: str
    line: int
    state: Literal["stored", "failed", "not_submitted"]
    reason: str | None = Field(
        default=None, description="The service's code or the error's name, for counting."
    )
    message: str | None = Field(default=None, description="What happened, for a person.")
    task_id: str | None = Field(
        default=None, description="The paid task, where the row has got that far."
    )
    uris: list[str] = Field(default_factory=list)


class BatchSummary(BaseModel):
    """How many rows were stored, how many failed and why."""

    output: str = Field(default="", description="Where the images are.")
    rows: int = Field(default=0, description="Rows seen.")
    stored: int = Field(default=0, description="Rows with all their images in place.")
    failed: int = Field(default=0, description="Rows that failed, refused ones among them.")
    not_submitted: int = Field(default=0, description="Rows left when the batch was stopped.")
    reasons: dict[str, int] = Field(
        default_factory=dict, description="How many rows failed for which reason."
    )
    failures: list[RowOutcome] = Field(
        default_factory=list, description="The first hundred rows that failed."
    )
    seconds: float = Field(default=0.0, description="From start to end.")

    def count(self, outcome: RowOutcome) -> Self:
        """Add what became of one row."""
        self.rows += 1
        if outcome.state == "stored":
            self.stored += 1
        elif outcome.state == "not_submitted":
            self.not_submitted += 1
        else:
            self.failed += 1
            reason = outcome.reason or "unknown"
            self.reasons[reason] = self.reasons.get(reason, 0) + 1
            if len(self.failures) < _FAILURES_KEPT:
                self.failures.append(outcome)
        return self

    def add(self, other: BatchSummary) -> Self:
        """Add what became of the rows of another summary."""
        self.rows += other.rows
        self.stored += other.stored
        self.failed += other.failed
        self.not_submitted += other.not_submitted
        for reason, number in other.reasons.items():
            self.reasons[reason] = self.reasons.get(reason, 0) + number
        self.failures += other.failures[: _FAILURES_KEPT - len(self.failures)]
        return self

    def __str__(self) -> str:
        parts = [f"{self.stored} of {self.rows} rows stored"]
        if self.failed:
            reasons = sorted(self.reasons.items(), key=lambda item: -item[1])
            told = ", ".join(f"{reason} {number}" for reason, number in reasons)
            parts.append(f"{self.failed} failed ({told})")
        if self.not_submitted:
            parts.append(f"{self.not_submitted} not submitted")
        if self.seconds:
            parts.append(f"{self.seconds:.1f} s, {self.stored / self.seconds:.1f} images a second")
        return "; ".join(parts)
