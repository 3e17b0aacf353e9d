"""The failure policy of a batch, the breaker that stops it, and the options of its rows."""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from prefect_flux_kontext.references.resolver import References

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from prefect_flux_kontext.client.polling import PollingCadence
    from prefect_flux_kontext.images.checks import Check

# Fewer than 20 rows prove nothing; when nine of ten fail, the cause is common to all of them.
_WINDOW_ROWS = 50
_MIN_ROWS = 20
_MAX_FAILED_SHARE = 0.9


class FailurePolicy(BaseModel):
    """What to do for each fail code; a row with any other code stays failed.

    Codes are compared without case and underscores, because the service writes some of them in
    two ways.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    retry: dict[str, int] = Field(
        default={"GENERATION_FAILED": 1, "PROCESSING_TIMEOUT": 1, "MODEL_UNAVAILABLE": 1},
        description="Fail codes to pay for again, and the number of retries at most.",
    )
    serve_again: dict[str, int] = Field(
        default={"INVALID_IMAGE_URL": 1, "IMAGE_DOWNLOAD_FAILED": 1},
        description="Likewise for rows whose reference image is signed or staged by the batch: "
        "first the image is signed again, or the staged file is checked.",
    )
    stop: list[str] = Field(
        default=["INSUFFICIENT_CREDITS", "INSUFFICIENT_BALANCE"],
        description="Fail codes that end the batch for the rows not yet submitted.",
    )
    never: list[str] = Field(
        default=[
            "CONTENT_VIOLATION",
            "NSFW",
            "SENSITIVE_CONTENT",
            "PROHIBITED_CONTENT",
            "INVALID_PROMPT",
            "PROMPT_TOO_LONG",
            "PROMPT_LENGTH_EXCEEDED",
        ],
        description="Parts of fail codes that are never paid for again, even when failed rows are "
        "retried: change the row instead.",
    )

    def decide(
        self,
        code: str | None,
        failures: int,
        *,
        asked_to_retry: bool = False,
        served: bool = False,
    ) -> Literal["leave", "retry", "stop"]:
        """Decide what to do with a failed row.

        Args:
            code: The fail code of its latest attempt.
            failures: Number of its attempts that were paid and failed.
            asked_to_retry: Whether the user asked to retry failed rows.
            served: Whether one of its reference images is signed or staged by the batch.

        Returns:
            "leave" to keep the row failed, "retry" to pay for another attempt, or "stop" to end
            the batch.
        """
        wanted = _normalize(code or "")
        if wanted in map(_normalize, self.stop):
            return "retry" if asked_to_retry else "stop"
        if any(part in wanted for part in map(_normalize, self.never)):
            return "leave"
        codes = {**self.serve_again, **self.retry} if served else self.retry
        allowed = next((n for name, n in codes.items() if _normalize(name) == wanted), 0)
        return "retry" if asked_to_retry or failures <= allowed else "leave"


def _normalize(code: str) -> str:
    return re.sub(r"[^a-z0-9]", "", code.lower())


class Breaker:
    """Detects that nearly all recent rows failed, so that the cause must be common to them."""

    def __init__(self) -> None:
        self._recent: deque[bool] = deque(maxlen=_WINDOW_ROWS)

    def record(self, *, stored: bool) -> bool:
        """Count a row; return whether to stop the batch.

        That is so when, of the last 50 rows, at least 20 are counted and 9 of 10 have failed.
        """
        self._recent.append(stored)
        failed = self._recent.count(False)
        return len(self._recent) >= _MIN_ROWS and failed >= _MAX_FAILED_SHARE * len(self._recent)


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """The user's options for the rows of a batch.

    Attributes:
        cadence: When to poll the service for a task.
        policy: What to do with failed rows.
        resubmit_unknown: Pay again for rows that may have been billed already.
        retry_failed: Pay again for rows that have failed.
        result_days: Days for which the service keeps a result.
        budget_usd: Dollars that the output may cost over all its runs; None for no cap.
        budget_by: Likewise, dollars by column and value, such as `{"team": {"blue": 20}}`.
        is_share: Whether the budgets are for this run alone, regardless of other runs: a
            partition's share of what remains.
        spend_by: Columns by whose values the summary counts what was spent.
        since: When the batch began, if its partitions have stored rows before this run.
        deferred: Submit all rows and leave their results for a later collection.
        references: How reference images that are not on the web reach the service.
        checks: The user's own checks of result images.
    """

    cadence: PollingCadence
    policy: FailurePolicy = field(default_factory=FailurePolicy)
    resubmit_unknown: bool = False
    retry_failed: bool = False
    result_days: float = 15.0
    budget_usd: float | None = None
    budget_by: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    is_share: bool = False
    spend_by: Sequence[str] = ()
    since: datetime | None = None
    deferred: bool = False
    references: References = field(default_factory=References)
    checks: Sequence[Check] = ()

    @property
    def has_budget(self) -> bool:
        """Whether there is a cap on what may be paid."""
        return self.budget_usd is not None or bool(self.budget_by)

    @property
    def money_columns(self) -> list[str]:
        """The columns whose values are recorded with each payment."""
        return list(dict.fromkeys([*self.spend_by, *self.budget_by]))
