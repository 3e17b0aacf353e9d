"""Readers of Parquet files, tables in memory and lists of dicts; the type of a manifest source.

Tables in memory are read through Arrow's PyCapsule interface, and all tables in batches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

from prefect_flux_kontext.errors import ManifestError
from prefect_flux_kontext.manifest.columns import (
    COLUMNS,
    MAX_CELL_CHARACTERS,
    Columns,
    Line,
    to_cells,
)
from prefect_flux_kontext.manifest.formats import (
    check_renames_used,
    open_source,
    resolve_columns,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

_BATCH_ROWS = 1_000
# Encoded size. A table of a million rows, the most that a manifest may have, has a tenth of it.
_MAX_ROW_GROUP_BYTES = 2**30


class Table:
    """A table in memory. It has no `__dict__`, so that nothing serializes it to JSON by accident.

    Args:
        data: A table with Arrow's PyCapsule interface: Arrow, polars, pandas, …
    """

    __slots__ = ("data",)

    def __init__(self, data: Any) -> None:
        self.data = data

    def __repr__(self) -> str:
        return f"<{type(self.data).__name__}>"


def normalize_source(value: Any) -> Any:
    """Convert a manifest's source to a form that can be read repeatedly: text, list or `Table`.

    Raises:
        TypeError: The value is not a supported source.
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
        "A manifest must be a path, an fsspec URL, a list of dicts or a table with Arrow's "
        f"interface, not {type(value).__name__}."
    )


def _validate_source(value: Any) -> Any:
    try:
        return normalize_source(value)
    except TypeError as error:
        raise ValueError(str(error)) from None


ManifestSource = Annotated[
    Any,
    BeforeValidator(_validate_source),
    WithJsonSchema(
        {
            "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}],
            "examples": ["s3://my-bucket/manifest.csv", "/data/manifest.parquet"],
        }
    ),
]
"""Type of a flow parameter that takes a manifest. Forms offer text or a list of objects."""


def read_in_memory_rows(
    rows: Sequence[dict[Any, Any]] | Table, renames: Mapping[str, str]
) -> Iterator[Line]:
    """Yield rows that were passed as a list of dicts or a table, numbered from 1.

    Raises:
        ManifestError: A column or a cell of a table is invalid, or no row has a renamed column.
        Exception: What Arrow raises.
    """
    if isinstance(rows, Table):
        yield from read_table(rows.data, renames)
        return
    url = "<rows>"
    unseen = set(renames.values())
    for number, row in enumerate(rows, start=1):
        names = [str(name) for name in row]
        unseen.difference_update(names)
        try:
            columns = resolve_columns(url, names, renames)
        except ManifestError as error:
            yield Line(number, {}, error.message.rstrip("."))
            continue
        cells, problem = to_cells(dict(zip(columns, row.values(), strict=True)))
        yield Line(number, cells, problem)
    check_renames_used(url, unseen)


def read_table(table: Any, renames: Mapping[str, str]) -> Iterator[Line]:
    """Yield the rows of a table in memory (Arrow, polars, pandas, …), numbered from 1.

    Raises:
        ManifestError: A column or a cell is invalid, or pyarrow is not installed.
        Exception: What Arrow raises.
    """
    name = f"<{type(table).__name__}>"
    pa = _import_pyarrow(name)
    stream = pa.RecordBatchReader.from_stream(table)
    batches = (
        batch.slice(start, _BATCH_ROWS)
        for batch in stream
        for start in range(0, len(batch), _BATCH_ROWS)
    )
    yield from _read_batches(pa, stream.schema.names, batches, name, renames)


def read_parquet(url: str, renames: Mapping[str, str]) -> Iterator[Line]:
    """Yield the rows of a Parquet file, numbered from 1.

    Text columns stay dictionary-encoded while they are read, so that a small file that repeats
    one long text a million times needs little memory.

    Raises:
        ManifestError: A column, a cell or a row group is invalid, or pyarrow is not installed.
        Exception: What the filesystem or Arrow raises.
    """
    pa = _import_pyarrow(url)
    import pyarrow.parquet as pq  # noqa: PLC0415 - an extra

    with open_source(url) as (file, _):
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
            if size > _MAX_ROW_GROUP_BYTES:
                raise ManifestError(
                    f"Row group {number + 1} of {url} has {size:,} bytes; write the file with "
                    f"row groups of at most {_MAX_ROW_GROUP_BYTES:,} bytes."
                )
        yield from _read_batches(pa, schema.names, table.iter_batches(_BATCH_ROWS), url, renames)


def _read_batches(
    pa: Any, names: list[str], batches: Iterable[Any], url: str, renames: Mapping[str, str]
) -> Iterator[Line]:
    columns = Columns(url, names, renames).names
    number = 0
    for batch in batches:
        rows = f"between rows {number + 1} and {number + _BATCH_ROWS}"
        column_values = [
            _read_values(pa, _blank_long_cells(pa, name, column), f"{name}, {rows}", url)
            for name, column in zip(columns, batch.columns, strict=True)
        ]
        for values in zip(*column_values, strict=True):
            number += 1
            cells, problem = to_cells(dict(zip(columns, values, strict=True)))
            if any(cells.values()) or problem:
                yield Line(number, cells, problem)


def _blank_long_cells(pa: Any, name: str, column: Any) -> Any:
    """Empty the cells of megabytes of a column without a meaning, which must not refuse rows."""
    if name in COLUMNS:
        return column
    import pyarrow.compute as pc  # noqa: PLC0415 - an extra

    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        return pa.nulls(len(column))
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        fits = pc.less_equal(pc.binary_length(column), 4 * MAX_CELL_CHARACTERS)
        return pc.if_else(fits, column, pa.scalar(None, column.type))
    return column


def _read_values(pa: Any, column: Any, where: str, url: str) -> list[Any]:
    if not pa.types.is_dictionary(column.type):
        _check_length(pa, column, where, url)
        values: list[Any] = column.to_pylist()
        return values
    # Convert only the texts of this batch: the dictionary has those of the whole row group.
    used = column.indices.unique().drop_null()
    texts = column.dictionary.take(used)
    _check_length(pa, texts, where, url)
    text_by_index = dict(zip(used.to_pylist(), texts.to_pylist(), strict=True))
    return [text_by_index.get(index) for index in column.indices.to_pylist()]


def _check_length(pa: Any, column: Any, where: str, url: str) -> None:
    """Refuse cells of megabytes before they are copied to Python objects."""
    import pyarrow.compute as pc  # noqa: PLC0415 - an extra

    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary)
    if len(column) and any(is_text(column.type) for is_text in texts):
        longest = pc.max(pc.binary_length(column)).as_py() or 0
        if longest > 4 * MAX_CELL_CHARACTERS:
            raise ManifestError(
                f"The manifest {url} has a cell of {longest:,} bytes in column {where}; the limit "
                f"is {MAX_CELL_CHARACTERS:,} characters."
            )


def _import_pyarrow(url: str) -> Any:
    try:
        import pyarrow  # noqa: PLC0415, ICN001 - an extra
    except ImportError:
        raise ManifestError(f"To read {url}, install `prefect-flux-kontext[parquet]`.") from None
    return pyarrow
