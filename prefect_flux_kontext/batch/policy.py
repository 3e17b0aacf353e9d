"""What a failure means for the row and for the batch."""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from prefect_flux_kontext.references.resolver import References

if TYPE_CHECKING:
    from datetime import datetime

    from prefect_flux_kontext.client.polling import PollingCadence

_WINDOW = 50
_FEWEST = 20
_TOO_MANY = 0.9


class FailurePolicy(BaseModel):
    """What to do for each fail code; a code that is not named here is left failed.

    Codes are compared without case and underscores: the service spells some in two ways.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    retry: dict[str, int] = Field(
        default={"GENERATION_FAILED": 1, "PROCESSING_TIMEOUT": 1, "MODEL_UNAVAILABLE": 1},
        description="Fail codes to pay for again, and how often at most.",
    )
    serve_again: dict[str, int] = Field(
        default={"INVALID_IMAGE_URL": 1, "IMAGE_DOWNLOAD_FAILED": 1},
        description="Likewise for rows whose reference image we sign or stage: it is signed anew, "
        "or what is staged is looked at, first.",
    )
    stop: list[str] = Field(
        default=["INSUFFICIENT_CREDITS", "INSUFFICIENT_BALANCE"],
        description="Fail codes that end the batch for the rows not yet submitted.",
    )
    never: list[str] = Field(
        default=[
            "CONTENT_VIOLATION",
            "NSFW_DETECTED",
            "SENSITIVE_CONTENT_DETECTED",
            "INVALID_PROMPT",
            "PROMPT_TOO_LONG",
        ],
        description="Fail codes that are not paid for again even when failed rows are retried: "
        "change the row instead.",
    )

    def decide(
        self,
        code: str | None,
        failures: int,
        *,
        asked_to_retry: bool = False,
        served: bool = False,
    ) -> Literal["leave", "retry", "stop"]:
        """What to do with a row.

        Args:
            code: The fail code of its latest attempt.
            failures: How many of its attempts were paid and failed.
            asked_to_retry: A person wants failed rows tried once more.
            served: A reference image of it is signed or staged by us.
        """
        plain = _plain(code or "")
        if plain in map(_plain, self.stop):
            return "retry" if asked_to_retry else "stop"
        if plain in map(_plain, self.never):
            return "leave"
        codes = {**self.serve_again, **self.retry} if served else self.retry
        allowed = next((n for name, n in codes.items() if _plain(name) == plain), 0)
        return "retry" if asked_to_retry or failures <= allowed else "leave"


def _plain(code: str) -> str:
    return re.sub(r"[^a-z0-9]", "", code.lower())


class Breaker:
    """Tells when so many rows fail that something must be wrong with all of them."""

    def __init__(self) -> None:
        self._recent: deque[bool] = deque(maxlen=_WINDOW)

    def broken(self, *, stored: bool) -> bool:
        """Count a row; True when at least 20, and 9 of 10 of the last 50, have failed."""
        self._recent.append(stored)
        failed = self._recent.count(False)
        return len(self._recent) >= _FEWEST and failed >= _TOO_MANY * len(self._recent)


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """What a person decides about the rows of a batch.

    Attributes:
        cadence: When to ask how a task is doing.
        policy: What a failure means.
        resubmit_unknown: Pay again for rows that may be paid for already.
        retry_failed: Pay again for rows that have failed.
        result_days: Days for which the service keeps a result.
        budget_usd: Dollars that the output may cost over all its runs; None for no cap.
        share_usd: Dollars that this run may cost by itself, whatever others spend meanwhile: a
            part's share of what is left of a budget; None for no share.
        since: When the batch began, where its parts have stored rows before this run.
        deferred: Submit all rows and leave results to be collected.
        references: How reference images that are not on the web get to the service.
    """

    cadence: PollingCadence
    policy: FailurePolicy = field(default_factory=FailurePolicy)
    resubmit_unknown: bool = False
    retry_failed: bool = False
    result_days: float = 15.0
    budget_usd: float | None = None
    share_usd: float | None = None
    since: datetime | None = None
    deferred: bool = False
    references: References = field(default_factory=References)
