"""The files of waves, so that a resume reads one file a wave and not a million records.

While a wave runs, `waves/<run>-<number>.open.json` names its rows. When it ends, the wave file
`waves/<run>-<number>.jsonl` gets one line for each row that is stored or failed. The open wave is
then removed, or keeps naming the rows that are still outstanding or unknown, or that were rejected
after an attempt that cost something.
"""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import TYPE_CHECKING, Literal, NotRequired, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from prefect_flux_kontext.errors import LedgerError
from prefect_flux_kontext.ledger.records import (
    OUTSTANDING_STATES,
    RECORD_VERSION,
    Ended,
    RecordVersion,
)
from prefect_flux_kontext.models import AspectRatio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence

    from prefect_flux_kontext.ledger.records import Entry
    from prefect_flux_kontext.ledger.store import RecordStore

R = TypeVar("R")

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


class _IndexedImage(TypedDict):
    flags: NotRequired[list[str]]


class _IndexedEnd(TypedDict):
    version: NotRequired[RecordVersion]
    state: Literal["stored", "failed"]
    at: datetime
    reason: NotRequired[str | None]
    files: NotRequired[list[str]]
    images: NotRequired[list[_IndexedImage]]


class IndexedRow(TypedDict):
    """What an index needs of a line of a wave file: a fifth of the time of the whole line."""

    version: NotRequired[RecordVersion]
    key: str
    attempt: int
    spent: float
    failures: int
    doubtful: NotRequired[float]
    columns: NotRequired[dict[str, str] | None]
    ended: _IndexedEnd


_INDEXED_ROW = TypeAdapter(IndexedRow)


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
    async for name, data in read_finished_waves(store):
        for row in _parse_lines(store, name, FinishedRow.model_validate_json, data.splitlines()):
            yield row


async def read_finished_waves(store: RecordStore) -> AsyncIterator[tuple[str, bytes]]:
    """Yield the name and the content of each wave file.

    Raises:
        LedgerError: A wave file cannot be read.
    """
    names = [name for name in await store.list_names("waves") if name.endswith(".jsonl")]
    async for name, data in _read_existing(store, names):
        yield name, data


async def read_lines_of_wave(
    store: RecordStore, name: str, numbers: Iterable[int]
) -> list[FinishedRow]:
    """Return the rows on some lines of a wave file; lines that it does not have are left out.

    Raises:
        LedgerError: The wave file cannot be read or is damaged.
    """
    lines = (await store.read(f"waves/{name}") or b"").splitlines()
    chosen = [lines[number] for number in numbers if number < len(lines)]
    return list(_parse_lines(store, name, FinishedRow.model_validate_json, chosen))


def parse_indexed_rows(store: RecordStore, name: str, data: bytes) -> Iterator[IndexedRow]:
    """Yield what an index needs of the rows of a wave file.

    Raises:
        LedgerError: The wave file is damaged.
    """
    return _parse_lines(store, name, _INDEXED_ROW.validate_json, data.splitlines())


def _parse_lines(
    store: RecordStore, name: str, parse: Callable[[bytes], R], lines: list[bytes]
) -> Iterator[R]:
    try:
        yield from map(parse, lines)
    except ValidationError:
        raise LedgerError(
            f"The ledger's wave file {store}/waves/{name} is damaged. "
            "Rebuild it: flux-kontext repair OUTPUT"
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
