"""The result manifest: its columns, the merging of its lines, and its files.

Each run writes its lines to part files, `_results/parts/*.jsonl`, one for each wave. At the end of
a run the part files of all ended runs are merged into `results.jsonl` and `results.parquet`. What
reads or writes the output raises a LedgerError if it cannot.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import shutil
import tempfile
from contextlib import asynccontextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from prefect_flux_kontext.errors import LedgerError
from prefect_flux_kontext.ledger.heartbeat import is_alive
from prefect_flux_kontext.ledger.store import RecordStore
from prefect_flux_kontext.models import utc_now
from prefect_flux_kontext.report.line_index import (
    HashSet,
    LineIndex,
    compute_digest,
    hash_verdicts,
    read_line_index,
)
from prefect_flux_kontext.report.statistics import hash_payment
from prefect_flux_kontext.storage.temp_db import TempDatabase, hash_name

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator, Mapping

    from prefect_flux_kontext.storage.filesystem import OutputFolder

RESULTS_JSONL = "results.jsonl"

Line = dict[str, Any]
"""A row of the result manifest, as in the JSON Lines file."""

COLUMNS: dict[str, str] = {
    "id": "string",
    "line": "integer",
    "state": "string",
    "reason": "string",
    "message": "string",
    "uri": "string",
    "uris": "strings",
    "file": "string",
    "sha256": "string",
    "bytes": "integer",
    "width": "integer",
    "height": "integer",
    "format": "string",
    "task_id": "string",
    "submitted_at": "timestamp",
    "finished_at": "timestamp",
    "waiting_seconds": "float",
    "generation_seconds": "float",
    "download_seconds": "float",
    "cost_usd": "decimal",
    "attempts": "integer",
    "stored_before": "boolean",
    "style": "string",
    "variant_number": "integer",
    "verdict": "string",
    "check_flags": "strings",
    "prompt": "string",
    "reference_images": "strings",
    "mode": "string",
    "aspect_ratio": "string",
    "matched_ratio": "string",
    "match_note": "string",
    "output_format": "string",
    "provider": "string",
    "key": "string",
    "run": "string",
    "flow_run_id": "string",
    "source": "string",
    "recorded_at": "timestamp",
}
"""The columns of the package and the type of their values."""

_REQUEST_COLUMNS = frozenset(
    {"id", "style", "prompt", "mode", "aspect_ratio", "output_format", "provider", "variants"}
)
"""Columns of both manifests. Their result value is the one that was sent to the service."""

_CUSTOM_PREFIX = "manifest_"

# Bounds the Parquet file: each of its row groups has metadata of every column.
_MAX_CUSTOM_COLUMNS = 500

# Bytes of lines that Arrow converts to one row group, some 2,500 rows. The metadata of all
# groups stays in memory until the end: 50 MB for a million rows in groups half as large.
_ROW_GROUP_BYTES = 2 * 2**20

# Row groups that later runs append to a Parquet file before it is written as a whole again.
_MAX_APPENDED_GROUPS = 50

_PARQUET_MAGIC = b"PAR1"

# Lines are written and read in order, so a larger cache would help little.
_CACHE_KIB = 2_048

# Columns of the manifest that a line from the ledger does not replace.
_KEPT_COLUMNS = ("line", "style", "source")

_RUN_PLAN = "plan.json"

# Part files that are read or removed at a time.
_PARALLEL_FILES = 16

# How often a waiting run checks whether the merge lock is free.
_LOCK_POLL_SECONDS = 1.0


def extract_custom_columns(cells: Mapping[str, str]) -> Line:
    """Return the custom columns of a manifest row under names that do not clash with `COLUMNS`.

    A column with the name of one of `COLUMNS`, in any case, gets the prefix `manifest_`, and so
    does one that has such a name after the prefix.
    """
    return {column: text for name, text in cells.items() if (column := _find_column(name))}


@lru_cache(2_000)
def _find_column(name: str) -> str | None:
    """Return the custom column for a column of the manifest, or None if it is of the request."""
    if name in _REQUEST_COLUMNS or not name:
        return None
    return f"{_CUSTOM_PREFIX}{name}" if _is_known_name(name) else name


def original_column_name(name: str) -> str:
    """Return the name that a custom column has in the manifest."""
    original = name.removeprefix(_CUSTOM_PREFIX)
    return original if _is_known_name(original) else name


def get_manifest_value(line: Line, name: str) -> Any:
    """Return the value that a row has in a column of the manifest, or None."""
    (column,) = extract_custom_columns({name: name}) or (name,)
    return line.get(column)


async def read_all_lines(output: OutputFolder) -> AsyncIterator[Line]:
    """Yield all lines of an output: those of the result manifest, then those of its part files.

    Raises:
        LedgerError: The output cannot be read.
        StorageError: The output cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="flux-kontext-") as folder:
        merged = Path(folder, "merged")
        await output.fetch(RESULTS_JSONL, merged)
        for line in read_lines(merged):
            yield line
    store = open_results_store(output)
    async for data in read_parts(store, await store.list_names("parts")):
        for text in data.splitlines():
            yield json.loads(text)


def _is_known_name(name: str) -> bool:
    """Whether a name is one of `COLUMNS` in any case, after any number of prefixes."""
    name = name.casefold()
    while name.startswith(_CUSTOM_PREFIX):
        name = name.removeprefix(_CUSTOM_PREFIX)
    return name in COLUMNS


def build_parquet_schema(custom_columns: Iterable[str]) -> Any:
    """Build the Arrow schema of the result manifest; custom columns are strings, at most 500."""
    import pyarrow as pa  # noqa: PLC0415 - comes with the extra `parquet`

    types = {
        "string": pa.string(),
        "strings": pa.list_(pa.string()),
        "integer": pa.int64(),
        "float": pa.float64(),
        "decimal": pa.decimal128(18, 6),  # exact, so sums over many rows are exact
        "boolean": pa.bool_(),
        "timestamp": pa.timestamp("ms", tz="UTC"),
    }
    fields = [pa.field(name, types[kind]) for name, kind in COLUMNS.items()]
    custom = list(custom_columns)[:_MAX_CUSTOM_COLUMNS]
    return pa.schema([*fields, *(pa.field(name, pa.string()) for name in custom)])


class LineMerger(TempDatabase):
    """New lines to merge into a result manifest, held in a private temporary database.

    Attributes:
        index: The index of the merged lines, after `write`. Custom columns are in the order of
            their first line.
        has_new_verdicts: Whether lines were written with other verdicts than before.
        kept: Number and bytes of the earlier lines, if none of them has changed.
    """

    def __init__(self) -> None:
        self.index = LineIndex()
        self.has_new_verdicts = False
        self.kept = (0, 0)
        self._new_custom_columns: dict[str, None] = {}
        super().__init__(
            "CREATE TABLE lines (number INTEGER PRIMARY KEY, name INTEGER UNIQUE, "
            "payment INTEGER, line TEXT)",
            cache_kib=_CACHE_KIB,
        )

    def add(self, data: bytes) -> None:
        """Add the lines of a part file."""
        for text in io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"):
            line = json.loads(text)
            name = _hash_identity(line)
            self._new_custom_columns.update(_custom_names(line))
            added = self._database.execute(
                "INSERT INTO lines (name, payment, line) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
                (name, hash_payment(line), text),
            )
            if not added.rowcount and (known := self._find(name)):
                merged = merge_lines(known, line)
                self._database.execute(
                    "UPDATE lines SET payment = ?, line = ? WHERE name = ?",
                    (hash_payment(merged), encode_line(merged), name),
                )

    def write(
        self,
        earlier: Path,
        merged: Path,
        verdicts: Mapping[str, str],
        known: LineIndex | None = None,
    ) -> int:
        """Write the earlier lines, updated, and then those of new rows; return their number.

        With an index, only lines that change are read. If none does, the earlier file is renamed
        and goes on, and so do the statistics.

        Args:
            earlier: The earlier lines.
            merged: The file to write.
            verdicts: By row key; joined to the lines.
            known: The index of the earlier lines, if there is one.
        """
        self.index = LineIndex(verdicts=hash_verdicts(verdicts))
        if known is not None and known.verdicts == self.index.verdicts:
            self.index.columns.update(known.columns)
        else:
            known = None
        changed: set[int] = set(self._select("name")) if known is not None else set()
        if known is not None and changed.isdisjoint(known.names):
            self.index = known
            self.kept = len(known), earlier.stat().st_size
            earlier.replace(merged)
        else:
            with merged.open("wb") as file:
                self._write_earlier(file, earlier, verdicts, known, changed)
        with merged.open("ab") as file:
            new: Iterator[Line] = map(json.loads, self._select("line"))
            if statistics := self.index.statistics:
                payments = set(self._select("payment"))
                new = statistics.count(new, payments.intersection(self.index.payments))
            for name, line in zip(self._select("name"), new, strict=True):
                self._write_line(file, line, name, verdicts)
        self.index.columns.update(self._new_custom_columns)
        return len(self.index)

    def _write_earlier(
        self,
        file: IO[bytes],
        earlier: Path,
        verdicts: Mapping[str, str],
        known: LineIndex | None,
        changed: set[int],
    ) -> None:
        """Write the earlier lines, merged with the new lines of the same rows."""
        for number, text in enumerate(_read_texts(earlier)):
            if known is not None and known.names[number] not in changed:
                file.write(text)
                self.index.add(known.names[number], known.digests[number], known.payments[number])
                continue
            line = json.loads(text)
            name = _hash_identity(line)
            new = self._find(name)
            self._write_line(file, merge_lines(line, new) if new else line, name, verdicts)
            self._database.execute("DELETE FROM lines WHERE name = ?", (name,))

    def _select(self, column: str) -> Iterator[Any]:
        found = self._database.execute(f"SELECT {column} FROM lines ORDER BY number")  # noqa: S608
        return (value for (value,) in found)

    def _write_line(
        self, file: IO[bytes], line: Line, name: int, verdicts: Mapping[str, str]
    ) -> None:
        verdict = verdicts.get(line.get("key", ""))
        if line.get("verdict") != verdict:
            self.has_new_verdicts = True
            line = {column: value for column, value in line.items() if column != "verdict"}
            line |= {"verdict": verdict} if verdict else {}
        custom = {column: line[column] for column in _custom_names(line)}
        self.index.columns.update(dict.fromkeys(custom))
        self.index.add(name, compute_digest(line, custom), hash_payment(line))
        file.write(encode_line(line).encode())

    def _find(self, name: int) -> Line | None:
        found = self._database.execute("SELECT line FROM lines WHERE name = ?", (name,)).fetchone()
        line: Line | None = json.loads(found[0]) if found else None
        return line


def line_identity(line: Line) -> str:
    """Return what identifies a row in all runs: its id, style and number among its variants."""
    return json.dumps([line["id"], line.get("style"), line.get("variant_number") or 1])


def _hash_identity(line: Line) -> int:
    return hash_name(line_identity(line).encode())


def _custom_names(line: Line) -> dict[str, None]:
    return dict.fromkeys(name for name in line if name not in COLUMNS)


def merge_lines(one: Line, other: Line) -> Line:
    """Return the current line of a row, given two lines of it in any order.

    The later line is current. Where states and attempts show which one is later, they count and
    the clocks of the machines do not.

    A line from the ledger alone describes the request that was paid for. If the row asks for
    something else by now, such a line changes nothing; otherwise it leaves the columns of the
    manifest as they are.
    """
    old, new = sorted((one, other), key=lambda line: str(line["recorded_at"]))
    if old.get("key") == new.get("key") and _is_further(old, new):
        old, new = new, old
    if new["source"] == "manifest":
        return new
    if old.get("key") != new.get("key"):
        return old
    custom = {name: value for name, value in old.items() if name not in COLUMNS}
    kept = {name: old[name] for name in _KEPT_COLUMNS if name in old}
    return new | kept | custom


def _is_further(line: Line, other: Line) -> bool:
    """Whether a line describes a later state of a request than another line of the same request.

    Nothing follows `stored`, the number of attempts only grows, and `outstanding` ends.
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


def encode_line(line: Line) -> str:
    """Encode a line of JSON Lines in ASCII, so that no text in it can end the line."""
    return json.dumps(line, allow_nan=False) + "\n"


def read_lines(path: Path) -> Iterator[Line]:
    """Yield the lines of a result manifest on this machine; none if the file is missing."""
    return map(json.loads, _read_texts(path))


async def load_digests(output: OutputFolder) -> HashSet:
    """Load the digests of the lines of an output.

    Raises:
        StorageError: The output cannot be read.
        ValueError: The result manifest is damaged.
    """
    stamp = await output.read_stamp(RESULTS_JSONL)
    if (index := await read_line_index(output, stamp)) is not None:
        return HashSet(index.digests)
    with tempfile.TemporaryDirectory(prefix="flux-kontext-") as folder:
        await output.fetch(RESULTS_JSONL, Path(folder, "lines"))
        return await asyncio.to_thread(
            lambda: HashSet(
                compute_digest(line, {name: line[name] for name in _custom_names(line)})
                for line in read_lines(Path(folder, "lines"))
            )
        )


def _read_texts(path: Path) -> Iterator[bytes]:
    if path.exists():
        with path.open("rb") as file:
            yield from file


def write_parquet(
    lines: Path,
    parquet: Path,
    custom_columns: Iterable[str],
    earlier: Path | None = None,
    kept: tuple[int, int] = (0, 0),
) -> bool:
    """Write a result manifest as Parquet; return False without the extra `parquet`.

    Arrow parses the text itself: Python objects would take more time and memory, and Arrow would
    import pandas to inspect them.

    Args:
        lines: The result manifest.
        parquet: The file to write.
        custom_columns: The names of the custom columns.
        earlier: A Parquet file, perhaps of the kept lines; it is copied as it is, and only the
            other lines are read. It is left without its footer.
        kept: Number and bytes of the lines that the manifest had before.
    """
    try:
        import pyarrow as pa  # noqa: PLC0415
        import pyarrow.json as pj  # noqa: PLC0415
        import pyarrow.parquet as pq  # noqa: PLC0415
    except ImportError:
        return False
    schema = build_parquet_schema(custom_columns)
    pool = pa.system_memory_pool()  # Arrow's own pool keeps 20 MB
    parse = pj.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    metadata = None if earlier is None else _read_kept_groups(earlier, schema, kept)
    with (
        lines.open("rb") as file,
        pa.OSFile(str(parquet), "wb") as sink,
        pq.ParquetWriter(sink, schema, compression="zstd", memory_pool=pool) as writer,
    ):
        if metadata is not None and earlier is not None:
            file.seek(kept[1])
            _cut_footer(earlier, metadata)
            with earlier.open("rb") as source:
                source.seek(len(_PARQUET_MAGIC))  # the writer has written it
                shutil.copyfileobj(source, sink)
        while text := file.read(_ROW_GROUP_BYTES) + file.readline():
            read = pj.ReadOptions(use_threads=False, block_size=len(text))
            writer.write_table(pj.read_json(pa.BufferReader(text), read, parse, pool))
    if metadata is not None:
        added = pq.read_metadata(parquet)
        _cut_footer(parquet, added)
        metadata.append_row_groups(added)
        footer = io.BytesIO()
        metadata.write_metadata_file(footer)
        with parquet.open("ab") as file:
            file.write(footer.getbuffer()[len(_PARQUET_MAGIC) :])
    return True


def _read_kept_groups(parquet: Path, schema: Any, kept: tuple[int, int]) -> Any:
    """Return the metadata of a file that has the kept lines, or None to write it as a whole."""
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    try:
        metadata = pq.read_metadata(parquet)
        is_current = metadata.num_rows == kept[0] and pq.read_schema(parquet).equals(schema)
    except (OSError, pa.ArrowException):  # it is missing or damaged
        return None
    most = kept[1] // _ROW_GROUP_BYTES + _MAX_APPENDED_GROUPS
    return metadata if is_current and metadata.num_row_groups <= most else None


def _cut_footer(parquet: Path, metadata: Any) -> None:
    # After the metadata come its length, of four bytes, and the magic.
    length = metadata.serialized_size + 4 + len(_PARQUET_MAGIC)
    os.truncate(parquet, parquet.stat().st_size - length)


def open_results_store(output: OutputFolder) -> RecordStore:
    """Open the folder of an output that holds the part files and the merge lock."""
    return RecordStore(output.below("_results"))


async def write_part(store: RecordStore, run: str, number: int, lines: Iterable[Line]) -> None:
    """Write the lines of a wave to a part file."""
    data = "".join(map(encode_line, lines)).encode()
    await store.replace(f"parts/{run}-{number:06}.jsonl", data)


async def write_run_plan(store: RecordStore, run: str, rows: int) -> None:
    """Record how many rows a run has, for those who watch it.

    Raises:
        LedgerError: The output cannot be written to.
    """
    plan = {"run": run, "rows": rows, "at": utc_now().isoformat()}
    await store.replace(_RUN_PLAN, json.dumps(plan).encode())


async def read_run_plan(store: RecordStore) -> dict[str, Any]:
    """Return `run`, `rows` and `at` of the latest run; empty if none has recorded them.

    Raises:
        LedgerError: The output cannot be read.
    """
    plan: dict[str, Any] = json.loads(await store.read(_RUN_PLAN) or b"{}")
    return plan


async def list_mergeable_parts(store: RecordStore, ledger: RecordStore, run: str) -> list[str]:
    """Return the names of the part files of this run and of runs that have ended."""
    names = await store.list_names("parts")
    runs = {name.partition("-")[0] for name in names} - {run}
    live = {other for other in runs if await is_alive(ledger, other)}
    return [name for name in names if name.partition("-")[0] not in live]


async def read_parts(store: RecordStore, names: list[str]) -> AsyncIterator[bytes]:
    """Yield the contents of part files, read 16 at a time."""
    for start in range(0, len(names), _PARALLEL_FILES):
        block = names[start : start + _PARALLEL_FILES]
        for data in await asyncio.gather(*(store.read(f"parts/{name}") for name in block)):
            yield data or b""


async def remove_parts(store: RecordStore, names: list[str]) -> None:
    """Remove part files that are merged."""
    for start in range(0, len(names), _PARALLEL_FILES):
        block = names[start : start + _PARALLEL_FILES]
        await asyncio.gather(*(store.discard(f"parts/{name}") for name in block))


@asynccontextmanager
async def acquire_merge_lock(
    store: RecordStore, ledger: RecordStore, run: str
) -> AsyncIterator[None]:
    """Hold the merge lock during the block: two runs that merge at a time would lose lines.

    The holders are numbered. The next number can be acquired once the last holder has released
    the lock or its run has ended.
    """
    while True:
        names = await store.list_names("locks")
        last = max((int(name.partition(".")[0]) for name in names), default=0)
        if last and f"{last:06}.released" not in names:
            holder = await store.read(f"locks/{last:06}.acquired") or b""
            if await is_alive(ledger, holder.decode() or run):
                await asyncio.sleep(_LOCK_POLL_SECONDS)
                continue
        lock = f"locks/{last + 1:06}"
        if await store.create(f"{lock}.acquired", run.encode()):
            break
    try:
        yield
    finally:
        await store.replace(f"{lock}.released", b"")
        with contextlib.suppress(LedgerError):  # a store need not allow it
            for name in names:
                await store.remove(f"locks/{name}")
