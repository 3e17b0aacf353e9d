"""The parts of the result manifest: what each wave came to, written when the wave ends.

`_results/parts/<run>-<number>.jsonl` can be read while the batch runs. When the run ends, its
parts, and those of runs that died, are merged into `results.jsonl`, and go.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from prefect_flux_kontext.ledger.owners import is_alive
from prefect_flux_kontext.ledger.store import RecordStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from prefect_flux_kontext.report.columns import Line
    from prefect_flux_kontext.storage import OutputFolder

_AT_ONCE = 16
_LOOK_AGAIN = 1.0


def results_store(output: OutputFolder) -> RecordStore:
    """Where the parts of an output's result manifest are: beside the images."""
    return RecordStore(output.below("_results"))


def as_json(line: Line) -> str:
    """A line of JSON Lines, in ASCII, so that no text in it can end the line."""
    return json.dumps(line, allow_nan=False) + "\n"


async def write_part(store: RecordStore, run: str, number: int, lines: Iterable[Line]) -> None:
    """Write what became of a wave's rows.

    Raises:
        LedgerError: The output cannot be written to.
    """
    data = "".join(map(as_json, lines)).encode()
    await store.replace(f"parts/{run}-{number:06}.jsonl", data)


async def ended_parts(store: RecordStore, ledger: RecordStore, run: str) -> list[str]:
    """The names of the parts of this run, and of runs that are gone.

    Raises:
        LedgerError: The output cannot be read.
    """
    names = await store.names("parts")
    runs = {name.partition("-")[0] for name in names} - {run}
    living = {other for other in runs if await is_alive(ledger, other)}
    return [name for name in names if name.partition("-")[0] not in living]


async def read_parts(store: RecordStore, names: list[str]) -> AsyncIterator[bytes]:
    """The contents of parts, a few at a time.

    Raises:
        LedgerError: The output cannot be read.
    """
    for start in range(0, len(names), _AT_ONCE):
        block = names[start : start + _AT_ONCE]
        for data in await asyncio.gather(*(store.read(f"parts/{name}") for name in block)):
            yield data or b""


async def remove_parts(store: RecordStore, names: list[str]) -> None:
    """Remove parts that are merged.

    Raises:
        LedgerError: The output cannot be written to.
    """
    for start in range(0, len(names), _AT_ONCE):
        block = names[start : start + _AT_ONCE]
        await asyncio.gather(*(store.remove(f"parts/{name}") for name in block))


@asynccontextmanager
async def turn_to_merge(store: RecordStore, ledger: RecordStore, run: str) -> AsyncIterator[None]:
    """Be the only run that merges, while the block runs: two at once would lose lines.

    Turns are numbered. The next can be taken once the last is over or its run is gone.

    Raises:
        LedgerError: The output cannot be read or written.
    """
    while True:
        names = await store.names("turns")
        last = max((int(name.partition(".")[0]) for name in names), default=0)
        if last and f"{last:06}.over" not in names:
            taken = await store.read(f"turns/{last:06}.taken") or b""
            if await is_alive(ledger, taken.decode() or run):
                await asyncio.sleep(_LOOK_AGAIN)
                continue
        turn = f"turns/{last + 1:06}"
        if await store.create(f"{turn}.taken", run.encode()):
            break
    try:
        yield
    finally:
        await store.replace(f"{turn}.over", b"")
        for name in names:
            await store.remove(f"turns/{name}")
