"""Verdicts on images: keep, reject or redo, one small record an image beside the ledger."""

from __future__ import annotations

import asyncio
import re
from datetime import datetime
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prefect_flux_kontext.errors import LedgerError
from prefect_flux_kontext.ledger.store import RecordStore
from prefect_flux_kontext.models import utc_now

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prefect_flux_kontext.storage.filesystem import OutputFolder

VERDICT_FOLDER = "_verdicts"

_NAME = re.compile(r"[0-9a-f]{32}\.json")


class Verdict(BaseModel):
    """A verdict on the image of a row key."""

    model_config = ConfigDict(frozen=True)

    version: int = 1
    key: str = Field(pattern="^[0-9a-f]{32}$")
    verdict: Literal["keep", "reject", "redo"] | None
    """None withdraws it."""
    prompt: str | None = Field(default=None, max_length=10_000)
    """For a redo."""
    style: str | None = Field(default=None, max_length=60)
    """For a redo."""
    variant: int | None = None
    """The variant to pay for, if a redo changes nothing else."""
    at: datetime = Field(default_factory=utc_now)


class Verdicts:
    """The verdicts of an output. Each image has one record, so the last one written wins."""

    def __init__(self, output: OutputFolder) -> None:
        self._output = output
        self._store = RecordStore(output.below(VERDICT_FOLDER))
        self._read: dict[str, tuple[str, Verdict]] = {}

    async def load(self) -> dict[str, Verdict]:
        """Return the verdicts by row key; only records that changed are read again.

        Raises:
            LedgerError: A record cannot be read or is damaged.
            StorageError: The records cannot be listed.
        """
        stamps = await self._output.list_stamps(VERDICT_FOLDER)
        known = {name: read for name, read in self._read.items() if stamps.get(name) == read[0]}
        names = [name for name in stamps if name not in known and _NAME.fullmatch(name)]
        records = await asyncio.gather(*map(self._store.read, names))
        for name, data in zip(names, records, strict=True):
            if data is not None:
                known[name] = stamps[name], self._parse(name, data)
        self._read = known
        return {
            verdict.key: verdict for _, verdict in known.values() if verdict.verdict is not None
        }

    async def record(self, verdicts: Iterable[Verdict]) -> None:
        """Write verdicts over earlier ones.

        Raises:
            LedgerError: The output cannot be written to.
        """
        await asyncio.gather(
            *(
                self._store.replace(f"{verdict.key}.json", verdict.model_dump_json().encode())
                for verdict in verdicts
            )
        )

    def _parse(self, name: str, data: bytes) -> Verdict:
        try:
            verdict = Verdict.model_validate_json(data)
        except ValidationError:
            verdict = None
        if verdict is None or f"{verdict.key}.json" != name:
            raise LedgerError(f"The verdict {self._store}/{name} is damaged. Remove it.")
        return verdict
