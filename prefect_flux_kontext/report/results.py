"""The columns of the result manifest: ours with their types, and what yours are named there."""

from __future__ import annotations

import asyncio
import io
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from prefect_flux_kontext.ledger.heartbeat import is_alive
from prefect_flux_kontext.ledger.store import RecordStore
from prefect_flux_kontext.storage.temp_db import TempDatabase

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from prefect_flux_kontext.storage.filesystem import OutputFolder

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path


Line = dict[str, Any]
"""A row of the result manifest, as it stands in the JSON Lines file."""

COLUMNS: dict[str, str] = {
    "id": "text",
    "line": "whole",
    "state": "text",
    "reason": "text",
    "message": "text",
    "uri": "text",
    "uris": "texts",
    "file": "text",
    "sha256": "text",
    "bytes": "whole",
    "width": "whole",
    "height": "whole",
    "format": "text",
    "task_id": "text",
    "submitted_at": "moment",
    "finished_at": "moment",
    "waiting_seconds": "number",
    "generation_seconds": "number",
    "download_seconds": "number",
    "cost_usd": "dollars",
    "attempts": "whole",
    "stored_before": "truth",
    "style": "text",
    "prompt": "text",
    "reference_images": "texts",
    "mode": "text",
    "aspect_ratio": "text",
    "output_format": "text",
    "provider": "text",
    "key": "text",
    "run": "text",
    "flow_run_id": "text",
    "source": "text",
    "recorded_at": "moment",
}
"""Our columns and the kind of their values."""

_OF_THE_MANIFEST = frozenset(
    {"id", "style", "prompt", "mode", "aspect_ratio", "output_format", "provider"}
)
"""Columns that a manifest has too, and means the same: ours tell what was really asked for."""

_APART = "manifest_"
_MOST_OWN = 500


def own_columns(cells: Mapping[str, str]) -> Line:
    """A manifest's other columns, under names that are not ours.

    A column that has the name of one of ours, in whatever case, gets `manifest_` before it.
    """
    own: Line = {}
    for name, text in cells.items():
        if name in _OF_THE_MANIFEST or not name:
            continue
        free = name
        while free.casefold() in COLUMNS or free in own:
            free = f"{_APART}{free}"
        own[free] = text
    return own


def manifest_name(name: str) -> str:
    """The name that one of your own columns has in the manifest."""
    meant = name.removeprefix(_APART)
    return meant if meant.casefold() in COLUMNS else name


def parquet_schema(own: Iterable[str]) -> Any:
    """The Arrow schema of the result manifest; your own columns are text, 500 at most."""
    import pyarrow as pa  # noqa: PLC0415 - comes with the extra `parquet`

    kinds = {
        "text": pa.string(),
        "texts": pa.list_(pa.string()),
        "whole": pa.int64(),
        "number": pa.float64(),
        # Exact, so that sums over many rows are.
        "dollars": pa.decimal128(18, 6),
        "truth": pa.bool_(),
        "moment": pa.timestamp("ms", tz="UTC"),
    }
    ours = [pa.field(name, kinds[kind]) for name, kind in COLUMNS.items()]
    return pa.schema([*ours, *(pa.field(name, pa.string()) for name in list(own)[:_MOST_OWN])])


_BLOCK = 2**20
"""Bytes of lines that become columns at once."""

_CACHE_KIB = 2_048
"""Lines are written and read in their order, so that a larger one would help little."""

_KEPT_OF_THE_MANIFEST = ("line", "style", "source")


class NewLines(TempDatabase):
    """Lines that are to be merged, in a private database in a temporary file.

    Attributes:
        own: The names of your own columns that were seen, in the order of their first line.
    """

    def __init__(self) -> None:
        self.own: dict[str, None] = {}
        self._own_of_new: dict[str, None] = {}
        super().__init__(
            "CREATE TABLE lines (number INTEGER PRIMARY KEY, name TEXT UNIQUE, line TEXT)",
            cache_kib=_CACHE_KIB,
        )

    def add(self, data: bytes) -> None:
        """Add the lines of a part."""
        for text in io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"):
            line = json.loads(text)
            name = _name(line)
            self._own_of_new.update(_own(line))
            added = self._database.execute(
                "INSERT INTO lines (name, line) VALUES (?, ?) ON CONFLICT DO NOTHING", (name, text)
            )
            if not added.rowcount and (known := self._line_of(name)):
                self._database.execute(
                    "UPDATE lines SET line = ? WHERE name = ?",
                    (as_json(newer_line(known, line)), name),
                )

    def write(self, earlier: Path, merged: Path) -> int:
        """Write the earlier lines as the new ones have changed them, and then the other new ones.

        Args:
            earlier: The result manifest as it was; there may be none.
            merged: Where to write it as it is.

        Returns:
            How many lines there are.
        """
        lines = 0
        with merged.open("w", encoding="ascii") as file:
            for line in read_lines(earlier):
                new = self._line_of(_name(line))
                now = newer_line(line, new) if new else line
                self.own.update(_own(now))
                file.write(as_json(now))
                lines += 1
                self._database.execute("DELETE FROM lines WHERE name = ?", (_name(line),))
            for (text,) in self._database.execute("SELECT line FROM lines ORDER BY number"):
                file.write(text)
                lines += 1
        self.own.update(self._own_of_new)
        return lines

    def _line_of(self, name: str) -> Line | None:
        found = self._database.execute("SELECT line FROM lines WHERE name = ?", (name,)).fetchone()
        line: Line | None = json.loads(found[0]) if found else None
        return line


def _name(line: Line) -> str:
    """What a row is known by from run to run."""
    return json.dumps([line["id"], line.get("style")])


def _own(line: Line) -> dict[str, None]:
    """The names of your own columns."""
    return dict.fromkeys(name for name in line if name not in COLUMNS)


def newer_line(one: Line, other: Line) -> Line:
    """How a row stands, by two lines of it.

    The later stands; where it follows from what they say which that is, clocks are not believed.
    But a line that was made of the ledger alone tells only of the request that its run has paid
    for: it changes nothing when the row asks for something else by now, and leaves the columns of
    the manifest as they are.
    """
    old, new = sorted((one, other), key=lambda line: str(line["recorded_at"]))
    if old.get("key") == new.get("key") and _is_further(old, new):
        old, new = new, old
    if new["source"] == "manifest":
        return new
    if old.get("key") != new.get("key"):
        return old
    own = {name: value for name, value in old.items() if name not in COLUMNS}
    kept = {name: old[name] for name in _KEPT_OF_THE_MANIFEST if name in old}
    return new | kept | own


def _is_further(line: Line, other: Line) -> bool:
    """Whether a row has come to what the line says after what the other says of the same request.

    Nothing follows `stored`, attempts are counted up, and what is outstanding ends.
    """
    states = line["state"], other["state"]
    if "stored" in states and states[0] != states[1]:
        return bool(states[0] == "stored")
    attempts, others = line.get("attempts"), other.get("attempts")
    if attempts is None or others is None:
        return False
    if attempts == others:
        return states == ("failed", "outstanding")
    return bool(attempts > others)


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of a result manifest on this machine; none where there is no file."""
    if path.exists():
        with path.open("rb") as file:
            yield from map(json.loads, file)


def write_parquet(lines: Path, parquet: Path, own: dict[str, None]) -> bool:
    """Write a result manifest as Parquet, some 1,200 rows in a row group.

    Arrow reads the text itself: Python's objects would take more time and memory, and looking at
    them Arrow would import pandas.

    Returns:
        Whether it was written: it takes the extra `parquet`.
    """
    try:
        import pyarrow as pa  # noqa: PLC0415
        import pyarrow.json as pj  # noqa: PLC0415
        import pyarrow.parquet as pq  # noqa: PLC0415
    except ImportError:
        return False
    schema = parquet_schema(own)
    pool = pa.system_memory_pool()  # Arrow's own keeps 20 MB
    columns = pj.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    with (
        lines.open("rb") as file,
        pq.ParquetWriter(parquet, schema, compression="zstd", memory_pool=pool) as writer,
    ):
        while text := file.read(_BLOCK) + file.readline():
            whole = pj.ReadOptions(use_threads=False, block_size=len(text))
            writer.write_table(pj.read_json(pa.BufferReader(text), whole, columns, pool))
    return True


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


async def read_ended_parts(store: RecordStore, ledger: RecordStore, run: str) -> list[str]:
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
async def merge_lock(store: RecordStore, ledger: RecordStore, run: str) -> AsyncIterator[None]:
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
