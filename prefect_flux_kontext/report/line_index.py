"""The index of a result manifest: which rows have which line, without reading the lines.

It is valid only for the `results.jsonl` that it was written with. Without a valid one, the lines
are read instead.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import json
import sys
import tempfile
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from prefect_flux_kontext.report.statistics import Statistics
from prefect_flux_kontext.storage.temp_db import hash_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from prefect_flux_kontext.report.results import Line
    from prefect_flux_kontext.storage.filesystem import OutputFolder

_NAME = "_results/lines.index"

DIGESTED_COLUMNS = ("state", "source", "id", "style", "variant_number", "key", "uris")

_STATISTICS = TypeAdapter(Statistics)


class LineIndex:
    """Three numbers for each line, in order.

    Attributes:
        names: The hashes of the rows' names.
        digests: The hashes of what the lines say of their rows.
        payments: The hashes of the keys of rows that cost something; 0 for others.
        columns: The custom columns, in order.
        verdicts: A hash of the verdicts that the lines have.
        statistics: The statistics of the lines; None if they were not counted.
    """

    def __init__(self, columns: Iterable[str] = (), verdicts: int = 0) -> None:
        self.names = array("q")
        self.digests = array("q")
        self.payments = array("q")
        self.columns = dict.fromkeys(columns)
        self.verdicts = verdicts
        self.statistics: Statistics | None = None

    def __len__(self) -> int:
        return len(self.names)

    def add(self, name: int, digest: int, payment: int) -> None:
        """Add the next line."""
        self.names.append(name)
        self.digests.append(digest)
        self.payments.append(payment)


class HashSet:
    """Hashes to look up, in 8 bytes each; a set would need ten times as many."""

    def __init__(self, hashes: Iterable[int] = ()) -> None:
        self._hashes = array("q", sorted(hashes))

    def __contains__(self, found: Any) -> bool:
        at = bisect.bisect_left(self._hashes, found)
        return at < len(self._hashes) and self._hashes[at] == found


def hash_verdicts(verdicts: Mapping[str, str]) -> int:
    """Return a hash of all verdicts by row key."""
    return hash_name(repr(sorted(verdicts.items())).encode())


async def read_line_index(output: OutputFolder, stamp: str | None) -> LineIndex | None:
    """Return the index of the result manifest with this stamp, or None without a valid one.

    Raises:
        StorageError: The output cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="flux-kontext-") as folder:
        file = Path(folder, "index")
        if stamp is None or not await output.fetch(_NAME, file):
            return None
        return await asyncio.to_thread(_read_file, file, stamp)


def _read_file(file: Path, stamp: str) -> LineIndex | None:
    with contextlib.suppress(ValueError, KeyError), file.open("rb") as data:  # if it is damaged
        found: dict[str, Any] = json.loads(data.readline())
        index = LineIndex(found["columns"], found["verdicts"])
        size = data.tell() + 3 * index.names.itemsize * found["lines"]
        if found["stamp"] == _describe(stamp) and file.stat().st_size == size:
            if found["statistics"]:
                index.statistics = _STATISTICS.validate_python(found["statistics"])
            for numbers in (index.names, index.digests, index.payments):
                numbers.fromfile(data, found["lines"])
            return index
    return None


async def write_line_index(output: OutputFolder, index: LineIndex, stamp: str | None) -> None:
    """Write the index of the result manifest with this stamp.

    Raises:
        StorageError: The output cannot be written to.
    """
    head = {
        "stamp": _describe(stamp),
        "lines": len(index),
        "columns": list(index.columns),
        "verdicts": index.verdicts,
        "statistics": index.statistics and _STATISTICS.dump_python(index.statistics),
    }
    with tempfile.TemporaryDirectory(prefix="flux-kontext-") as folder:
        file = Path(folder, "index")
        await asyncio.to_thread(_write_file, file, json.dumps(head), index)
        await output.put(_NAME, file)


def _write_file(file: Path, head: str, index: LineIndex) -> None:
    with file.open("wb") as data:
        data.write(f"{head}\n".encode())
        for numbers in (index.names, index.digests, index.payments):
            numbers.tofile(data)


def _describe(stamp: str | None) -> list[str | None]:
    # The version of the file, and how the numbers are written.
    return ["2", sys.byteorder, stamp]


def compute_digest(line: Line, custom: Mapping[str, Any]) -> int:
    """Return a hash of what a line says of its row, and not of when it was written or by whom.

    Args:
        line: The line.
        custom: Its custom columns.
    """
    return hash_content(*map(line.get, DIGESTED_COLUMNS), custom)


def hash_content(*content: Any) -> int:
    """Return the digest of the values of `DIGESTED_COLUMNS`, and of the custom columns."""
    *values, custom = content
    return hash_name(repr([*values, sorted(custom.items())]).encode())
