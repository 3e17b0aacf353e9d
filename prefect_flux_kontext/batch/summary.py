"""The outcome of single rows and the summary of a batch, whose size is bounded."""

from __future__ import annotations

import html
import importlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, TypeAlias, get_args

from pydantic import BaseModel, Field

from prefect_flux_kontext.batch.spending import GroupSpend
from prefect_flux_kontext.redaction import make_showable

if TYPE_CHECKING:
    from prefect_flux_kontext.errors import FluxKontextError
    from prefect_flux_kontext.ledger.records import Entry
    from prefect_flux_kontext.ledger.waves import FinishedRow
    from prefect_flux_kontext.manifest.row import RefusedRow, Row

_MAX_FAILURES_SHOWN = 20

_MAX_FAILURES = 100
"""Rows that a summary lists, so that its size does not grow with the batch."""

RowState = Literal["stored", "failed", "unknown", "outstanding", "not_submitted"]


RowName: TypeAlias = tuple[str, str | None, str | None]
"""The id and the style of a row, and which of its variants it is."""


def get_row_name(row_id: str, cells: Mapping[str, str]) -> RowName:
    """Return what tells a row from the others of its manifest."""
    return row_id, cells.get("style") or None, cells.get("variants") or None


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
    flags: list[str] = Field(default_factory=list, description="What checks of its image found.")
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
    spent_by: list[GroupSpend] = Field(
        default_factory=list,
        description="The same by the values of columns, the dearest first; at most a hundred and "
        "one for the rest.",
    )
    balance_before: float | None = Field(
        default=None, description="Dollars of the account before the run, where known."
    )
    balance_after: float | None = Field(
        default=None, description="Dollars of the account after it, where known."
    )
    reasons: dict[str, int] = Field(
        default_factory=dict, description="Number of rows that are not stored, by reason."
    )
    flags: dict[str, int] = Field(
        default_factory=dict, description="Number of stored rows by what checks of images found."
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
        for flag in outcome.flags:
            self.flags[flag] = self.flags.get(flag, 0) + 1
        if outcome.state in ("failed", "unknown", "outstanding"):
            reason = outcome.reason or "no reason given"
            self.reasons[reason] = self.reasons.get(reason, 0) + 1
            if len(self.failures) < _MAX_FAILURES:
                self.failures.append(outcome)
        return self

    def add(self, other: BatchSummary) -> Self:
        """Add the counts, reasons and failures of another summary."""
        for name in ("rows", "already_stored", *get_args(RowState)):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for counts, others in ((self.reasons, other.reasons), (self.flags, other.flags)):
            for name, number in others.items():
                counts[name] = counts.get(name, 0) + number
        self.failures += other.failures[: _MAX_FAILURES - len(self.failures)]
        return self

    def describe_balance(self) -> str:
        """Return how the account's balance has changed; empty if that is not known."""
        if self.balance_before is None or self.balance_after is None:
            return ""
        change = round(self.balance_after - self.balance_before, 6)
        if not change:
            return f"the balance is ${self.balance_after:,.2f}"
        verb = "rose" if change > 0 else "fell"
        return f"the balance {verb} by ${abs(change):,.2f} to ${self.balance_after:,.2f}"

    def to_pandas(self) -> Any:
        """Return the results of the output as a pandas DataFrame, one row for each row ever run.

        Raises:
            ImportError: pandas is not installed.
            StorageError: The results cannot be read.
        """
        return importlib.import_module("pandas").DataFrame(self._read_results())

    def to_polars(self) -> Any:
        """Return the results of the output as a polars DataFrame, one row for each row ever run.

        Raises:
            ImportError: polars is not installed.
            StorageError: The results cannot be read.
        """
        polars = importlib.import_module("polars")
        return polars.DataFrame(self._read_results(), infer_schema_length=None)

    def _read_results(self) -> list[dict[str, Any]]:
        import fsspec  # noqa: PLC0415 - slow to import

        from prefect_flux_kontext.errors import StorageError  # noqa: PLC0415
        from prefect_flux_kontext.report.results import RESULTS_JSONL  # noqa: PLC0415
        from prefect_flux_kontext.settings import FluxKontextSettings  # noqa: PLC0415

        url = f"{self.output.rstrip('/')}/{RESULTS_JSONL}"
        try:
            fs, path = fsspec.core.url_to_fs(url, **FluxKontextSettings().fsspec_options())
            return [json.loads(line) for line in fs.cat_file(path).splitlines()]
        except Exception as error:  # noqa: BLE001 - each filesystem has errors of its own
            raise StorageError(
                f"The results {url} cannot be read ({type(error).__name__}). Check the output and "
                "FLUX_KONTEXT_STORAGE_OPTIONS."
            ) from None

    def _repr_html_(self) -> str:
        """Show the summary in a notebook: the contact sheet if it is local, and the failures."""
        from prefect_flux_kontext.models import read_as_data_url  # noqa: PLC0415
        from prefect_flux_kontext.report.gallery.builder import CONTACT_SHEET  # noqa: PLC0415

        parts = [f"<p><b>{html.escape(str(self))}</b><br>{html.escape(self.output)}</p>"]
        if sheet := read_as_data_url(f"{self.output}/{CONTACT_SHEET}", 1_280):
            parts.append(f'<img src="{sheet}" alt="contact sheet">')
        if self.failures:
            lines = [
                "".join(
                    f"<td>{html.escape(str(cell or ''))}</td>"
                    for cell in (row.label, row.line, row.state, row.message)
                )
                for row in self.failures[:_MAX_FAILURES_SHOWN]
            ]
            names = "<th>row</th><th>line</th><th>state</th><th>what happened</th>"
            parts.append(f"<table><tr>{names}</tr><tr>{'</tr><tr>'.join(lines)}</tr></table>")
        return "\n".join(parts)

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
        if self.flags:
            flags = sorted(self.flags.items(), key=lambda item: -item[1])
            parts.append("look at: " + ", ".join(f"{flag} {number}" for flag, number in flags))
        if self.spent:
            parts.append(f"${self.spent:.2f} spent")
        if change := self.describe_balance():
            parts.append(change)
        if self.seconds:
            parts.append(f"{self.seconds:.1f} s")
            if rate := (self.stored - self.already_stored) / self.seconds:
                parts[-1] += f", {rate:.{1 if rate >= 1 else 2}f} images a second"
        return "; ".join(parts)
