"""Settings of the sandbox."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, DirectoryPath, Field

Dollars = Annotated[Decimal, Field(ge=0, decimal_places=6)]

PHOTOS = Path(__file__).parent / "photos"
"""Folder of the bundled reference photos."""


class SandboxSettings(BaseModel):
    """Settings of the sandbox; the defaults are those of the real service.

    The descriptions are also the help texts of `flux-kontext sandbox`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: float = Field(30.0, ge=0, description="mean generation time in seconds")
    spread: float = Field(
        0.35, ge=0, description="standard deviation of the generation time, as a share of the mean"
    )
    seed: int = Field(
        0,
        description="seed of task ids, times and failures; equal requests repeat a run",
    )
    fail_rate: float = Field(
        0.0, ge=0, le=1, description="share of tasks that fail with GENERATION_FAILED, 0 to 1"
    )
    slots: int = Field(1_000, ge=1, description="tasks running at the same time, for each API key")
    requests_per_minute: int = Field(
        10_000, ge=1, description="submits and status requests in any 60 s, for each API key"
    )
    api_key: str | None = Field(
        None, min_length=1, description="the only accepted API key (without it: any key)"
    )
    price_pro: Dollars = Field(Decimal("0.03"), description="dollars for a task in mode pro")
    price_pro_official: Dollars | None = Field(
        None, description="likewise for provider official (without it: the same)"
    )
    price_max: Dollars = Field(Decimal("0.06"), description="dollars for a task in mode max")
    price_max_official: Dollars | None = Field(
        None, description="likewise for provider official (without it: the same)"
    )
    balance: Dollars = Field(Decimal(10_000), description="dollars each API key starts with")
    result_lifetime: float = Field(
        15 * 86_400.0, ge=0, description="seconds a result URL is valid after its task has ended"
    )
    references: DirectoryPath = Field(
        PHOTOS, description="folder served at /references/ (without it: six bundled photos)"
    )
    fetch_timeout: float = Field(
        20.0, gt=0, description="time limit in seconds for the fetch of a reference image"
    )
    long_edge: int = Field(
        1_024, ge=16, le=4_096, description="pixels on the long edge of a result image"
    )
    callback_timeout: float = Field(
        30.0,
        gt=0,
        description="time limit in seconds for a receiver to answer a callback with 200",
    )
    callback_delay_scale: float = Field(
        1.0,
        ge=0,
        description="factor for the delays of 5, 15 and 60 s before a callback is repeated",
    )
