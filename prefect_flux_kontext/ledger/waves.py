"""A wave's end in one object, so that a resume reads parts and not a million records.

While a wave runs, `waves/<run>-<number>.open.json` names its rows. When it ends, one line for
each row that is stored or failed goes to `waves/<run>-<number>.jsonl`, and the open object goes,
or keeps naming the rows that are still owed something.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from prefect_flux_kontext.errors import LedgerError
from prefect_flux_kontext.ledger.records import OUTSTANDING_STATES, Ended

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence

    from prefect_flux_kontext.ledger.records import Entry
    from prefect_flux_kontext.ledger.store import RecordStore

_READ_AT_ONCE = 16


class FinishedRow(BaseModel):
    """A line of a part: a row to which nothing more will happen by itself."""

    model_config = ConfigDict(frozen=True)

    key: str
    row_id: str
    attempt: int
    spent: float
    failures: int
    doubtful: float = 0.0
    ended: Ended


class OpenWave(BaseModel):
    """The rows of a wave that is not finished."""

    model_config = ConfigDict(frozen=True)

    name: str
    owner: str
    keys: list[str]


def _finished(entry: Entry) -> FinishedRow | None:
    if entry.ended is None or entry.intent is None:
        return None
    return FinishedRow(
        key=entry.key,
        row_id=entry.intent.row_id,
        attempt=entry.attempt,
        spent=entry.spent,
        failures=entry.failures,
        doubtful=entry.doubtful,
        ended=entry.ended,
    )


async def open_wave(store: RecordStore, wave: OpenWave) -> None:
    """Name a wave's rows before any of them is paid for.

    Raises:
        LedgerError: The ledger cannot be written to; nothing may be paid.
    """
    await store.replace(f"waves/{wave.name}.open.json", wave.model_dump_json().encode())


async def close_wave(store: RecordStore, wave: OpenWave, entries: Iterable[Entry]) -> None:
    """Write the part of a wave, and keep it open for rows that are still owed something.

    Only once for a wave: a second part of that name would replace the first.

    Args:
        store: The ledger's records.
        wave: The wave.
        entries: Where its rows stand; a row that is missing here stays open.

    Raises:
        LedgerError: The ledger cannot be written to; the wave stays open.
    """
    known = {entry.key: entry for entry in entries}
    finished = [row for entry in known.values() if (row := _finished(entry)) is not None]
    owed = [key for key in wave.keys if key not in known or known[key].state in OUTSTANDING_STATES]
    if finished:
        lines = "".join(f"{row.model_dump_json(exclude_none=True)}\n" for row in finished)
        await store.replace(f"waves/{wave.name}.jsonl", lines.encode())
    if owed:
        await open_wave(store, wave.model_copy(update={"keys": owed}))
    else:
        await delete_wave(store, wave)


async def delete_wave(store: RecordStore, wave: OpenWave) -> None:
    """Name a wave no more: its rows are in other waves and parts.

    Where nothing may be removed, it is left without rows.

    Raises:
        LedgerError: The ledger cannot be written to.
    """
    try:
        await store.remove(f"waves/{wave.name}.open.json")
    except LedgerError:
        await open_wave(store, wave.model_copy(update={"keys": []}))


async def read_finished_rows(store: RecordStore) -> AsyncIterator[FinishedRow]:
    """Every row in the parts; a later attempt of a row may stand in another part.

    Raises:
        LedgerError: A part cannot be read or is damaged.
    """
    names = [name for name in await store.names("waves") if name.endswith(".jsonl")]
    async for name, data in _contents(store, names):
        try:
            for line in data.splitlines():
                yield FinishedRow.model_validate_json(line)
        except ValidationError:
            raise LedgerError(
                f"The ledger's part {store}/waves/{name} is damaged. Remove it: its rows are read "
                "from their own records then."
            ) from None


async def read_open_waves(store: RecordStore) -> AsyncIterator[OpenWave]:
    """Every wave that is not finished, whether its run lives or not.

    Raises:
        LedgerError: One cannot be read or is damaged.
    """
    names = [name for name in await store.names("waves") if name.endswith(".open.json")]
    async for name, data in _contents(store, names):
        try:
            wave = OpenWave.model_validate_json(data)
        except ValidationError:
            raise LedgerError(f"The ledger record {store}/waves/{name} is damaged.") from None
        if wave.keys:
            yield wave


async def _contents(store: RecordStore, names: Sequence[str]) -> AsyncIterator[tuple[str, bytes]]:
    for start in range(0, len(names), _READ_AT_ONCE):
        block = names[start : start + _READ_AT_ONCE]
        for name, data in zip(
            block,
            await asyncio.gather(*(store.read(f"waves/{name}") for name in block)),
            strict=True,
        ):
            if data is not None:  # another run has finished the wave meanwhile
                yield name, data
