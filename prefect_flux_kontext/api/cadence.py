"""When to ask the service how a task is doing."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


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

    @model_validator(mode="after")
    def _there_is_a_first_look(self) -> Self:
        if self.timeout <= self.initial_delay:
            raise ValueError("timeout must be longer than initial_delay, or nothing is ever asked")
        return self
