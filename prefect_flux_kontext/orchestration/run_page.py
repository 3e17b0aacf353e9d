"""What the page of a flow run shows first: the run's name and the message of its last state."""

from __future__ import annotations

import hashlib
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, cast

from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed

if TYPE_CHECKING:
    from prefect_flux_kontext.batch.summary import BatchSummary

_DIGEST_CHARACTERS = 8


def name_run() -> str:
    """Return the name of the current flow run: its output and its date."""
    started_at = flow_run.scheduled_start_time or datetime.now(UTC)
    output = flow_run.parameters.get("output")
    return f"{name_output(output if isinstance(output, str) else '')} · {started_at:%F}"


def name_output(output: str) -> str:
    """Return the last part of an output's path or URL."""
    return output.rstrip("/").rpartition("/")[2] or "batch"


def build_artifact_key(output: str, kind: str) -> str:
    """Return the key of an artifact, which is the same for all runs into one output."""
    name = re.sub(r"[^a-z0-9]+", "-", name_output(output).lower()).strip("-")
    digest = hashlib.sha256(output.encode(errors="surrogateescape")).hexdigest()
    return "-".join(part for part in (name, kind, digest[:_DIGEST_CHARACTERS]) if part)


def complete(summary: BatchSummary) -> BatchSummary:
    """Return the end state of a flow run, with its counts as the message.

    Callers of the flow get the summary.
    """
    if flow_run.run_count > 1:
        # Prefect raises the error of an earlier attempt at callers of a flow that returns a state.
        return summary
    counts = [
        (summary.failed, "failed"),
        (summary.unknown, "unknown"),
        (summary.outstanding, "outstanding"),
        (summary.not_submitted, "not submitted"),
    ]
    parts = [
        f"{summary.stored:,} of {summary.rows:,} stored",
        *(f"{number:,} {label}" for number, label in counts if number),
        f"${summary.spent:,.2f}",
    ]
    # A flow may return a state; Prefect hands its data to the caller.
    return cast("BatchSummary", Completed(message=", ".join(parts), data=summary))


def decline(*, after_pilot: bool = False) -> BatchSummary:
    """Return the end state of a flow run that was cancelled instead of approved."""
    more = " more" if after_pilot else ""
    message = f"The plan was declined, so nothing{more} was submitted."
    return cast("BatchSummary", Cancelled(message=message))
