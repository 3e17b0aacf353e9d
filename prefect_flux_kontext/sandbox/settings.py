"""Everything about the sandbox that can be set."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

from pydantic import BaseModel, ConfigDict, DirectoryPath, Field

PHOTOS = Path(__file__).parent / "photos"
"""The reference photos that come with the package."""


class SandboxSettings(BaseModel):
    """How the sandbox behaves; the defaults are those of the real service.

    The descriptions are also the help texts of `flux-kontext sandbox`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: float = Field(30.0, ge=0, description="mean generation time in seconds")
    spread: float = Field(
        0.35, ge=0, description="standard deviation of the generation time, as a share of the mean"
    )
    seed: int = Field(
        0,
        description="decides task ids, times and failures: the same requests repeat the same run",
    )
    fail_rate: float = Field(
        0.0, ge=0, le=1, description="share of tasks that fail with GENERATION_FAILED, 0 to 1"
    )
    slots: int = Field(1_000, ge=1, description="tasks running at once, for each API key")
    requests_per_minute: int = Field(
        10_000, ge=1, description="submits and status requests in any 60 s, for each API key"
    )
    api_key: str | None = Field(
        None, min_length=1, description="the only key that is let in (without it: any key)"
    )
    price_pro: Decimal = Field(
        Decimal("0.03"), ge=0, decimal_places=6, description="dollars for a task in mode pro"
    )
    price_max: Decimal = Field(
        Decimal("0.06"), ge=0, decimal_places=6, description="dollars for a task in mode max"
    )
    balance: Decimal = Field(
        Decimal(10_000), ge=0, decimal_places=6, description="dollars each API key starts with"
    )
    result_lifetime: float = Field(
        15 * 86_400.0, ge=0, description="seconds a result URL lives after its task has ended"
    )
    references: DirectoryPath = Field(
        PHOTOS, description="folder served at /references/ (without it: six bundled photos)"
    )
    fetch_timeout: float = Field(
        20.0, gt=0, description="seconds a reference image may take to arrive"
    )
    long_edge: int = Field(
        1_024, ge=16, le=4_096, description="pixels on the long edge of a result image"
    )
    callback_timeout: float = Field(
        30.0, gt=0, description="seconds a receiver has to answer a callback with 200"
    )
    callback_delay_scale: float = Field(
        1.0, ge=0, description="multiplies the 5, 15 and 60 s before a callback is delivered again"
    )
