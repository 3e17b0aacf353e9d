"""When to ask the service how a task is doing."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class PollingCadence(BaseModel):
    """How long to wait before the first look, between looks, and in all.

    The defaults for the first two are the service's own advice: generation takes about 30 s,
    so wait 20 s, then ask every 3 s.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    initial_delay: float = Field(
        default=20.0, ge=0, description="Seconds from submit to the first look."
    )
    interval: float = Field(default=3.0, gt=0, description="Seconds between further looks.")
    timeout: float = Field(
        default=900.0, gt=0, description="Seconds to wait in all, by the clock."
    )
