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

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    mean: float = Field(default=30.0, ge=0)
    """mean generation time in seconds"""
    spread: float = Field(default=0.35, ge=0)
    """standard deviation of the generation time, as a share of the mean"""
    seed: int = 0
    """seed of task ids, times and failures; equal requests repeat a run"""
    fail_rate: float = Field(default=0.0, ge=0, le=1)
    """share of tasks that fail with GENERATION_FAILED, 0 to 1"""
    slots: int = Field(default=1_000, ge=1)
    """tasks running at the same time, for each API key"""
    requests_per_minute: int = Field(default=10_000, ge=1)
    """submits and status requests in any 60 s, for each API key"""
    api_key: str | None = Field(default=None, min_length=1)
    """the only accepted API key (without it: any key)"""
    price_pro: Dollars = Decimal("0.03")
    """dollars for a task in mode pro"""
    price_pro_official: Dollars | None = None
    """likewise for provider official (without it: the same)"""
    price_max: Dollars = Decimal("0.06")
    """dollars for a task in mode max"""
    price_max_official: Dollars | None = None
    """likewise for provider official (without it: the same)"""
    balance: Dollars = Decimal(10_000)
    """dollars each API key starts with"""
    result_lifetime: float = Field(default=15 * 86_400.0, ge=0)
    """seconds a result URL is valid after its task has ended"""
    references: DirectoryPath = PHOTOS
    """folder served at /references/ (without it: six bundled photos)"""
    fetch_timeout: float = Field(default=20.0, gt=0)
    """time limit in seconds for the fetch of a reference image"""
    long_edge: int = Field(default=1_024, ge=16, le=4_096)
    """pixels on the long edge of a result image"""
    callback_timeout: float = Field(default=30.0, gt=0)
    """time limit in seconds for a receiver to answer a callback with 200"""
    callback_delay_scale: float = Field(default=1.0, ge=0)
    """factor for the delays of 5, 15 and 60 s before a callback is repeated"""
