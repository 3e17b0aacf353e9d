"""The states of a row and the moves between them."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from prefect_flux_kontext.models import GenerationRequest, GenerationTask, StoredImage, utc_now


class State(StrEnum):
    """How far a row has come.

    `unknown` is a row whose submit may have been accepted without our learning of it: it is
    never sent again by itself.
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
    # A person, or a callback that names the row, settles it.
    State.UNKNOWN: frozenset({State.ACCEPTED, State.REJECTED}),
    State.ACCEPTED: frozenset({State.SUCCEEDED, State.FAILED}),
    State.SUCCEEDED: frozenset({State.STORED}),
    # The next attempt, under the next number.
    State.REJECTED: frozenset({State.INTENT}),
    State.FAILED: frozenset({State.INTENT}),
    State.STORED: frozenset(),
}
"""The legal moves; every other is a mistake in this package."""

PAID_STATES = frozenset({State.ACCEPTED, State.SUCCEEDED, State.FAILED, State.STORED})
"""States of an attempt that the service bills."""

OUTSTANDING_STATES = frozenset({State.INTENT, State.UNKNOWN, State.ACCEPTED, State.SUCCEEDED})
"""States in which something paid, or maybe paid, is still to come."""

GIVEN_UP = "resubmitted"
"""The reason of an attempt that a person has paid for again without knowing what came of it."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    at: datetime = Field(default_factory=utc_now, description="When it was written.")


class Intent(_Record):
    """Durable before the first byte of the POST: from here on the row may be paid for."""

    key: str
    attempt: int
    owner: str = Field(description="The run that is about to pay.")
    nonce: str = Field(description="Tells this attempt's records from every other's.")
    row_id: str
    line: int
    name: str | None = Field(
        default=None, description="The row's name below the output; an old record has none."
    )
    style: str | None = None
    request: GenerationRequest
    price: float = Field(description="Dollars, by the prices that were set.")


class Posted(_Record):
    """What the POST came to: the first such record of an attempt stands."""

    state: Literal["accepted", "rejected"]
    by: str = Field(description="The run, `person` or `callback`.")
    task_id: str | None = None
    reason: str | None = None
    message: str | None = None


class Times(NamedTuple):
    """When a task ended and what took how long; None where it is not known."""

    completed_at: datetime | None = None
    generation_seconds: float | None = None
    waiting_seconds: float | None = None
    download_seconds: float | None = None


class Ended(_Record):
    """Nothing more is to come of the attempt. For a stored row, also its image's sidecar."""

    state: Literal["stored", "failed"]
    task_id: str
    files: list[str] = Field(default_factory=list, description="Names below the output.")
    images: list[StoredImage] = Field(default_factory=list)
    reason: str | None = None
    message: str | None = None
    submitted_at: datetime | None = Field(default=None, description="When it was accepted.")
    completed_at: datetime | None = Field(default=None, description="By the service's clock.")
    generation_seconds: float | None = Field(default=None, description="By the service's count.")
    waiting_seconds: float | None = Field(
        default=None, description="From being accepted until its end was noticed."
    )
    download_seconds: float | None = Field(
        default=None, description="To download, check and store the images."
    )


class Entry(BaseModel):
    """A row as its records tell it: the latest attempt, and what the earlier ones came to.

    Attributes:
        key: The row key.
        attempt: Number of the latest attempt; 0 where there is none.
        failed_before: Earlier attempts that were paid and failed.
        spent_before: Dollars of earlier attempts that were accepted.
        doubtful_before: Dollars of earlier attempts that were given up without being known.
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
        """The latest attempt's state; `intent` may turn out `unknown` when its owner is gone."""
        if self.ended is not None:
            return State(self.ended.state)
        if self.posted is not None:
            return State(self.posted.state)
        return State.PLANNED if self.intent is None else State.INTENT

    @property
    def spent(self) -> float:
        """Dollars of all attempts that were accepted."""
        paid = self.intent is not None and self.state in PAID_STATES
        return self.spent_before + (self.intent.price if paid and self.intent else 0.0)

    @property
    def doubtful(self) -> float:
        """Dollars of all attempts that were given up though they may have been accepted."""
        given_up = self.posted is not None and self.posted.reason == GIVEN_UP
        return self.doubtful_before + (self.intent.price if given_up and self.intent else 0.0)

    @property
    def failures(self) -> int:
        """Attempts that were paid and failed."""
        return self.failed_before + (self.state is State.FAILED)

    def next_attempt(self, intent: Intent) -> Entry:
        """The row with a further attempt, which has only its intent so far."""
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
        """The accepted task."""
        if self.intent is None or self.posted is None or self.posted.task_id is None:
            raise ValueError(f"row {self.key} has no accepted task")
        return GenerationTask(
            task_id=self.posted.task_id,
            request=self.intent.request,
            submitted_at=self.posted.at,
        )
