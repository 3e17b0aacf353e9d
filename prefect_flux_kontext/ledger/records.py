"""The records of a row, its states and the legal moves between them."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from prefect_flux_kontext.errors import LedgerError
from prefect_flux_kontext.models import GenerationRequest, GenerationTask, StoredImage, utc_now


class State(StrEnum):
    """The state of a row.

    `unknown` is a row whose submit may have been accepted although no reply arrived. It is never
    submitted again automatically.
    """

    PLANNED = "planned"
    INTENT = "intent"
    ACCEPTED = "accepted"
    UNKNOWN = "unknown"
    REJECTED = "rejected"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STORED = "stored"


MOVES: dict[State, frozenset[State]] = {
    State.PLANNED: frozenset({State.INTENT}),
    State.INTENT: frozenset({State.ACCEPTED, State.REJECTED, State.UNKNOWN}),
    # Settled by a user, or by a callback that names the row.
    State.UNKNOWN: frozenset({State.ACCEPTED, State.REJECTED}),
    State.ACCEPTED: frozenset({State.SUCCEEDED, State.FAILED}),
    State.SUCCEEDED: frozenset({State.STORED}),
    # The next attempt, under the next number.
    State.REJECTED: frozenset({State.INTENT}),
    State.FAILED: frozenset({State.INTENT}),
    State.STORED: frozenset(),
}
"""The legal moves; any other move is a bug in this package."""

PAID_STATES = frozenset({State.ACCEPTED, State.SUCCEEDED, State.FAILED, State.STORED})
"""States of an attempt that the service bills."""

OUTSTANDING_STATES = frozenset({State.INTENT, State.UNKNOWN, State.ACCEPTED, State.SUCCEEDED})
"""States in which a result that was, or may have been, paid for can still arrive."""

RECORD_VERSION = 1
"""Version of the fields of each kind of record; it grows when a field changes its meaning."""

GIVEN_UP = "resubmitted"
"""The reason of an attempt whose outcome stayed unknown and that a user chose to pay again."""


def check_version(version: int) -> int:
    """Return the version of a record that this release can read.

    Raises:
        LedgerError: A newer release has written the record.
    """
    if version > RECORD_VERSION:
        raise LedgerError(
            f"A record of this output has version {version} and this release reads version "
            f"{RECORD_VERSION}: upgrade prefect-flux-kontext."
        )
    return version


RecordVersion = Annotated[int, AfterValidator(check_version)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    version: RecordVersion = Field(default=RECORD_VERSION, description="Of the record's fields.")
    at: datetime = Field(default_factory=utc_now, description="When it was written.")


class Intent(_Record):
    """Written before the first byte of the POST; from here on the row may be paid for."""

    key: str
    attempt: int
    owner: str = Field(description="The run that is about to pay.")
    nonce: str = Field(description="Makes this attempt's record different from every other's.")
    row_id: str
    line: int
    name: str | None = Field(
        default=None, description="The row's name below the output; None in old records."
    )
    style: str | None = None
    variant: int = 1
    request: GenerationRequest
    price: float = Field(description="Dollars, by the configured prices.")
    columns: dict[str, str] | None = Field(
        default=None, description="The row's values in the columns that money is counted by."
    )


class Posted(_Record):
    """The outcome of the POST; the first such record of an attempt takes precedence."""

    state: Literal["accepted", "rejected"]
    by: str = Field(description="The run, `person` or `callback`.")
    task_id: str | None = None
    reason: str | None = None
    message: str | None = None


class Times(NamedTuple):
    """When a task ended and how long each step took, in seconds; None where unknown."""

    completed_at: datetime | None = None
    generation_seconds: float | None = None
    waiting_seconds: float | None = None
    download_seconds: float | None = None


class Ended(_Record):
    """The final outcome of an attempt. For a stored row, also the sidecar of its images."""

    state: Literal["stored", "failed"]
    task_id: str
    files: list[str] = Field(default_factory=list, description="Names below the output.")
    images: list[StoredImage] = Field(default_factory=list)
    reason: str | None = None
    message: str | None = None
    submitted_at: datetime | None = Field(default=None, description="When it was accepted.")
    completed_at: datetime | None = Field(
        default=None, description="When it ended, by the service's clock."
    )
    generation_seconds: float | None = Field(default=None, description="As the service reports.")
    waiting_seconds: float | None = Field(
        default=None, description="From acceptance until a poll or callback reported the end."
    )
    download_seconds: float | None = Field(
        default=None, description="To download, check and store the images."
    )

    @property
    def flags(self) -> list[str]:
        """What the checks found about its first image."""
        return self.images[0].flags if self.images else []


class Entry(BaseModel):
    """A row as read from its records: the latest attempt, and the totals of earlier ones.

    Attributes:
        key: The row key.
        attempt: Number of the latest attempt; 0 if there is none.
        intent: The latest attempt's intent.
        posted: The outcome of the latest attempt's POST, where recorded.
        ended: The final outcome of the latest attempt, where recorded.
        failed_before: Earlier attempts that were paid and failed.
        spent_before: Dollars for earlier attempts that were accepted.
        doubtful_before: Dollars for earlier attempts that were given up while unknown.
    """

    model_config = ConfigDict(frozen=True)

    key: str
    attempt: int = 0
    intent: Intent | None = None
    posted: Posted | None = None
    ended: Ended | None = None
    failed_before: int = 0
    spent_before: float = 0.0
    doubtful_before: float = 0.0

    @property
    def state(self) -> State:
        """The latest attempt's state; `intent` means `unknown` when its owner is dead."""
        if self.ended is not None:
            return State(self.ended.state)
        if self.posted is not None:
            return State(self.posted.state)
        return State.PLANNED if self.intent is None else State.INTENT

    @property
    def spent(self) -> float:
        """Dollars for all attempts that were accepted."""
        paid = self.intent is not None and self.state in PAID_STATES
        return self.spent_before + (self.intent.price if paid and self.intent else 0.0)

    @property
    def doubtful(self) -> float:
        """Dollars for all attempts that may have been accepted: unknown, or given up as such."""
        given_up = self.posted is not None and self.posted.reason == GIVEN_UP
        in_doubt = given_up or self.state is State.INTENT
        return self.doubtful_before + (self.intent.price if in_doubt and self.intent else 0.0)

    @property
    def columns(self) -> dict[str, str]:
        """The values by which the row's money is counted."""
        return (self.intent.columns if self.intent else None) or {}

    @property
    def failures(self) -> int:
        """How many attempts were paid and failed."""
        return self.failed_before + (self.state is State.FAILED)

    def next_attempt(self, intent: Intent) -> Entry:
        """Return the row with a further attempt, which has only its intent so far."""
        return Entry(
            key=self.key,
            attempt=intent.attempt,
            intent=intent,
            failed_before=self.failures,
            spent_before=self.spent,
            doubtful_before=self.doubtful,
        )

    @property
    def task(self) -> GenerationTask:
        """The accepted task.

        Raises:
            ValueError: The latest attempt was not accepted.
        """
        if self.intent is None or self.posted is None or self.posted.task_id is None:
            raise ValueError(f"row {self.key} has no accepted task")
        return GenerationTask(
            task_id=self.posted.task_id,
            request=self.intent.request,
            submitted_at=self.posted.at,
        )
