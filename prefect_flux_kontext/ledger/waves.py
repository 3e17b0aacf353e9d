"""The files of waves, so that a resume reads one file a wave and not a million records.

While a wave runs, `waves/<run>-<number>.open.json` names its rows. When it ends, the wave file
`waves/<run>-<number>.jsonl` gets one line for each row that is stored or failed. The open wave is
then removed, or keeps naming the rows that are still outstanding or unknown, or that were rejected
after an attempt that cost something.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from prefect_flux_kontext.errors import LedgerError
from prefect_flux_kontext.ledger.records import (
    OUTSTANDING_STATES,
    RECORD_VERSION,
    Ended,
    RecordVersion,
)
from prefect_flux_kontext.models import AspectRatio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator, Sequence

    from prefect_flux_kontext.ledger.records import Entry
    from prefect_flux_kontext.ledger.store import RecordStore

_CONCURRENT_READS = 16


class FinishedRow(BaseModel):
    """A line of a wave file: a row that is stored or failed."""

    model_config = ConfigDict(frozen=True)

    version: RecordVersion = RECORD_VERSION
    key: str
    row_id: str
    attempt: int
    spent: float
    failures: int
    doubtful: float = 0.0
    matched_ratio: AspectRatio | None = None
    match_note: str | None = None
    columns: dict[str, str] | None = None
    ended: Ended


class OpenWave(BaseModel):
    """The rows of a wave that is not finished."""

    model_config = ConfigDict(frozen=True)

    version: RecordVersion = RECORD_VERSION
    name: str
    owner: str
    keys: list[str]


async def open_wave(store: RecordStore, wave: OpenWave) -> None:
    """Record the rows of a wave before any of them is paid for.

    Raises:
        LedgerError: The ledger cannot be written to; nothing may be paid.
    """
    await store.replace(f"waves/{wave.name}.open.json", wave.model_dump_json().encode())


async def close_wave(store: RecordStore, wave: OpenWave, entries: Iterable[Entry]) -> None:
    """Write the wave file, and keep the wave open for rows that do not belong in it.

    Call this only once for a wave: a second wave file of that name would replace the first.

    Args:
        store: The ledger's records.
        wave: The wave.
        entries: The latest entries of its rows; a row that is missing here stays open.

    Raises:
        LedgerError: The ledger cannot be written to; the wave stays open.
    """
    known = {entry.key: entry for entry in entries}
    finished = [row for entry in known.values() if (row := _to_finished_row(entry)) is not None]
    unfinished = [key for key in wave.keys if key not in known or _stays_open(known[key])]
    unfinished += [key for key in known if key not in wave.keys and _stays_open(known[key])]
    if finished:
        lines = "".join(f"{row.model_dump_json(exclude_none=True)}\n" for row in finished)
        await store.replace(f"waves/{wave.name}.jsonl", lines.encode())
    if unfinished:
        await open_wave(store, wave.model_copy(update={"keys": unfinished}))
    else:
        await delete_wave(store, wave)


async def delete_wave(store: RecordStore, wave: OpenWave) -> None:
    """Remove an open wave whose rows are recorded in wave files or in other open waves.

    If the store refuses to remove it, it is left without rows.

    Raises:
        LedgerError: The ledger cannot be written to.
    """
    try:
        await store.remove(f"waves/{wave.name}.open.json")
    except LedgerError:
        await open_wave(store, wave.model_copy(update={"keys": []}))


async def read_finished_rows(store: RecordStore) -> AsyncIterator[FinishedRow]:
    """Yield every row of the wave files; several may hold attempts of the same row.

    Raises:
        LedgerError: A wave file cannot be read or is damaged.
    """
    async for rows in read_finished_waves(store):
        for row, _ in rows:
            yield row


async def read_finished_waves(
    store: RecordStore,
) -> AsyncIterator[Iterator[tuple[FinishedRow, bytes]]]:
    """Yield for each wave file an iterator over its rows and their lines.

    Raises:
        LedgerError: A wave file cannot be read or, by the iterator, is damaged.
    """
    names = [name for name in await store.list_names("waves") if name.endswith(".jsonl")]
    async for name, data in _read_existing(store, names):
        yield _parse_finished_rows(f"{store}/waves/{name}", data)


def _parse_finished_rows(name: str, data: bytes) -> Iterator[tuple[FinishedRow, bytes]]:
    try:
        for line in data.splitlines():
            yield FinishedRow.model_validate_json(line), line
    except ValidationError:
        raise LedgerError(
            f"The ledger's wave file {name} is damaged. Rebuild it: flux-kontext repair OUTPUT"
        ) from None


async def read_open_waves(store: RecordStore) -> AsyncIterator[OpenWave]:
    """Yield every wave that is not finished, whether or not its run is alive.

    Raises:
        LedgerError: An open wave cannot be read or is damaged.
    """
    names = [name for name in await store.list_names("waves") if name.endswith(".open.json")]
    async for name, data in _read_existing(store, names):
        try:
            wave = OpenWave.model_validate_json(data)
        except ValidationError:
            raise LedgerError(
                f"The ledger's open wave {store}/waves/{name} is damaged. "
                "Rebuild it: flux-kontext repair OUTPUT"
            ) from None
        if wave.keys:
            yield wave


def _stays_open(entry: Entry) -> bool:
    # A rejected row has no line in a wave file. If earlier attempts cost something, an open wave
    # has to name it, so that this is counted.
    return entry.state in OUTSTANDING_STATES or (
        entry.ended is None and bool(entry.spent or entry.doubtful)
    )


def _to_finished_row(entry: Entry) -> FinishedRow | None:
    if entry.ended is None or entry.intent is None:
        return None
    return FinishedRow(
        key=entry.key,
        row_id=entry.intent.row_id,
        attempt=entry.attempt,
        spent=entry.spent,
        failures=entry.failures,
        doubtful=entry.doubtful,
        matched_ratio=entry.intent.request.matched_ratio,
        match_note=entry.intent.request.match_note,
        columns=entry.intent.columns,
        ended=entry.ended,
    )


async def _read_existing(
    store: RecordStore, names: Sequence[str]
) -> AsyncIterator[tuple[str, bytes]]:
    for start in range(0, len(names), _CONCURRENT_READS):
        block = names[start : start + _CONCURRENT_READS]
        for name, data in zip(
            block,
            await asyncio.gather(*(store.read(f"waves/{name}") for name in block)),
            strict=True,
        ):
            if data is not None:  # else another run has finished the wave meanwhile
                yield name, data
