"""Parquet files, and tables in memory: whatever speaks Arrow's interface, a batch at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import fsspec
from pydantic import BeforeValidator, WithJsonSchema

from prefect_flux_kontext.errors import ManifestError
from prefect_flux_kontext.manifest.columns import LONGEST_CELL, Columns, Line, to_cells
from prefect_flux_kontext.manifest.formats import check_seen, columns_of_object

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

_BATCH = 1_000
_LARGEST_GROUP = 2**30
"""Bytes of a row group as it is encoded; a table of a million rows has a tenth in all."""


def read_parquet(url: str, renamed: Mapping[str, str]) -> Iterator[Line]:
    """The rows of a Parquet file, numbered from 1.

    Columns stay dictionaries while they are read, so that a little file that holds one long text
    a million times stays little.

    Raises:
        ManifestError: It holds what no manifest holds.
        Exception: What the filesystem or Arrow raises.
    """
    pa = _pyarrow(url)
    import pyarrow.parquet as pq  # noqa: PLC0415 - an extra

    with fsspec.open(url, "rb") as file:
        schema = pq.read_schema(file)
        texts = [
            field.name
            for field in schema
            if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)
        ]
        file.seek(0)
        table = pq.ParquetFile(file, read_dictionary=texts, pre_buffer=False)
        for number in range(table.num_row_groups):
            size = table.metadata.row_group(number).total_byte_size
            if size > _LARGEST_GROUP:
                raise ManifestError(
                    f"The manifest {url} has a row group of {size:,} bytes; write it with smaller "
                    "ones."
                )
        yield from _lines(pa, schema.names, table.iter_batches(_BATCH), url, renamed)


def read_table(table: Any, renamed: Mapping[str, str]) -> Iterator[Line]:
    """The rows of a table in memory (Arrow, polars, pandas, …), numbered from 1.

    Raises:
        ManifestError: It holds what no manifest holds.
        Exception: What Arrow raises.
    """
    name = f"<{type(table).__name__}>"
    pa = _pyarrow(name)
    stream = pa.RecordBatchReader.from_stream(table)
    small = (
        batch.slice(start, _BATCH) for batch in stream for start in range(0, len(batch), _BATCH)
    )
    yield from _lines(pa, stream.schema.names, small, name, renamed)


def _lines(
    pa: Any, names: list[str], batches: Iterable[Any], url: str, renamed: Mapping[str, str]
) -> Iterator[Line]:
    columns = Columns(url, names, renamed).names
    number = 0
    for batch in batches:
        taken = [
            _values(pa, column, f"{name}, between rows {number + 1} and {number + _BATCH}", url)
            for name, column in zip(columns, batch.columns, strict=True)
        ]
        for values in zip(*taken, strict=True):
            number += 1
            cells, problem = to_cells(dict(zip(columns, values, strict=True)))
            if any(cells.values()) or problem:
                yield Line(number, cells, problem)


def _values(pa: Any, column: Any, where: str, url: str) -> list[Any]:
    if not pa.types.is_dictionary(column.type):
        _check_length(pa, column, where, url)
        values: list[Any] = column.to_pylist()
        return values
    # Only the words of this batch: a dictionary has those of the whole row group.
    used = column.indices.unique().drop_null()
    words = column.dictionary.take(used)
    _check_length(pa, words, where, url)
    of = dict(zip(used.to_pylist(), words.to_pylist(), strict=True))
    return [of.get(at) for at in column.indices.to_pylist()]


def _check_length(pa: Any, column: Any, where: str, url: str) -> None:
    """Refuse cells of megabytes before a thousand copies of them are made."""
    import pyarrow.compute as pc  # noqa: PLC0415 - an extra

    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary)
    if len(column) and any(is_text(column.type) for is_text in texts):
        longest = pc.max(pc.binary_length(column)).as_py() or 0
        if longest > 4 * LONGEST_CELL:
            raise ManifestError(
                f"The manifest {url} has a cell of {longest:,} bytes in {where}; a cell has at "
                f"most {LONGEST_CELL:,} characters."
            )


def _pyarrow(url: str) -> Any:
    try:
        import pyarrow  # noqa: PLC0415, ICN001 - an extra
    except ImportError:
        raise ManifestError(f"To read {url}, install `prefect-flux-kontext[parquet]`.") from None
    return pyarrow


class Table:
    """A table in memory. It has no dictionary of its own, so that nobody writes it out as JSON.

    Args:
        data: Whatever speaks Arrow's PyCapsule interface: an Arrow, polars or pandas table, …
    """

    __slots__ = ("data",)

    def __init__(self, data: Any) -> None:
        self.data = data

    def __repr__(self) -> str:
        return f"<{type(self.data).__name__}>"


def source(value: Any) -> Any:
    """What is given as a manifest, so that it can be read again and again.

    Raises:
        TypeError: It is nothing of the kind.
    """
    if isinstance(value, str | Table):
        return value
    if hasattr(value, "__fspath__"):
        return str(value)
    if hasattr(value, "__arrow_c_stream__"):
        return Table(value)
    if isinstance(value, list | tuple) and all(isinstance(row, dict) for row in value):
        return list(value)
    raise TypeError(
        "A manifest is a path, an fsspec URL, a list of dicts or a table that speaks Arrow, not "
        f"{type(value).__name__}."
    )


def _valid(value: Any) -> Any:
    try:
        return source(value)
    except TypeError as error:
        raise ValueError(str(error)) from None


ManifestSource = Annotated[
    Any,
    BeforeValidator(_valid),
    WithJsonSchema(
        {
            "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}],
            "examples": ["s3://my-bucket/manifest.csv", "/data/manifest.parquet"],
        }
    ),
]
"""The parameter of a flow that takes a manifest; a form offers text or a list of objects."""


def read_given_rows(
    given: Sequence[dict[Any, Any]] | Table, renamed: Mapping[str, str]
) -> Iterator[Line]:
    """The rows, numbered from 1.

    Raises:
        ManifestError: They hold what no manifest holds.
        Exception: What Arrow raises.
    """
    if isinstance(given, Table):
        yield from read_table(given.data, renamed)
        return
    url = "<rows>"
    unseen = set(renamed.values())
    for number, row in enumerate(given, start=1):
        names = [str(name) for name in row]
        unseen.difference_update(names)
        try:
            columns = columns_of_object(url, names, renamed)
        except ManifestError as error:
            yield Line(number, {}, error.message.rstrip("."))
            continue
        cells, problem = to_cells(dict(zip(columns, row.values(), strict=True)))
        yield Line(number, cells, problem)
    check_seen(url, unseen)
