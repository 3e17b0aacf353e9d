"""One line for each row, as it stands: the result manifest from its last state and new parts."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING

from prefect_flux_kontext.report.columns import COLUMNS, parquet_schema
from prefect_flux_kontext.report.parts import as_json
from prefect_flux_kontext.scratch import Scratch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from prefect_flux_kontext.report.columns import Line

_BLOCK = 2**20
"""Bytes of lines that become columns at once."""

_CACHE_KIB = 2_048
"""Lines are written and read in their order, so that a larger one would help little."""

_KEPT_OF_THE_MANIFEST = ("line", "style", "source")


class NewLines(Scratch):
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
                    (as_json(newer(known, line)), name),
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
                now = newer(line, new) if new else line
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


def newer(one: Line, other: Line) -> Line:
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
