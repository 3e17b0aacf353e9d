"""What a person decides about the rows of a batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prefect_flux_kontext.batch.policy import FailurePolicy
from prefect_flux_kontext.references.resolving import References

if TYPE_CHECKING:
    from datetime import datetime

    from prefect_flux_kontext.api.cadence import PollingCadence


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
