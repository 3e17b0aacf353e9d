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
    count_blank_row,
    resolve_columns,
)
from prefect_flux_kontext.references.remote import open_source

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

_BATCH_ROWS = 1_000
# Encoded size. A table of a million rows, the most that a manifest may have, has a tenth of it.
_MAX_ROW_GROUP_BYTES = 2**30
# A row group that exceeds both is a decompression bomb: no real table compresses that well.
_BOMB_MIN_BYTES = 2**26
_BOMB_RATIO = 200
_MAX_FIXED_BYTES = 1_024
# A single row may hold all nested values of a row group, and is read at once.
_MAX_NESTED_VALUES = 5_000_000
# Nested values become Python objects, some 60 bytes each, and then text.
_MAX_BATCH_VALUES = 1_000_000
_MAX_BATCH_BYTES = 2**25


class Table:
    """A table with Arrow's PyCapsule interface: Arrow, polars, pandas, ….

    It has no `__dict__`, so that nothing serializes it to JSON by accident.
    """

    __slots__ = ("data",)

    def __init__(self, data: Any) -> None:
        self.data = data

    def __repr__(self) -> str:
        return f"<{type(self.data).__name__}>"


def normalize_source(value: Any) -> Any:
    """Convert a manifest's source to what can be read repeatedly: text, list or `Table`."""
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
        f"interface (pandas since 2.2), not {type(value).__name__}."
    )


ManifestSource = Annotated[
    Any,
    # Its TypeError is no validation error, of which Prefect would log the value.
    BeforeValidator(normalize_source),
    WithJsonSchema(
        {
            "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}],
            "examples": ["s3://my-bucket/manifest.csv", "/data/manifest.parquet"],
        }
    ),
]
"""Type of a flow parameter that takes a manifest. Forms offer text or a list of objects."""


def read_in_memory_rows(
    rows: Sequence[dict[Any, Any]] | Table,
    renames: Mapping[str, str],
    url: str = "<rows>",
    lines: Sequence[int] | None = None,
) -> Iterator[Line]:
    """Yield rows that were passed as a list of dicts or a table, numbered from 1."""
    if isinstance(rows, Table):
        yield from read_table(rows.data, renames)
        return
    unseen = set(renames.values())
    for number, row in zip(lines or range(1, len(rows) + 1), rows, strict=True):
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
    """Yield the rows of a table in memory (Arrow, polars, pandas, …), numbered from 1."""
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
    """
    pa = _import_pyarrow(url)
    import pyarrow.parquet as pq  # noqa: PLC0415 - an extra

    with open_source(url) as (file, _):
        parquet = pq.ParquetFile(file, pre_buffer=False)
        columns = [parquet.schema.column(at) for at in range(parquet.metadata.num_columns)]
        _check_row_groups(parquet.metadata, columns, url)
        texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
        names = parquet.schema_arrow.names
        file.seek(0)
        parquet = pq.ParquetFile(file, read_dictionary=texts, pre_buffer=False)
        yield from _read_batches(pa, names, parquet.iter_batches(_BATCH_ROWS), url, renames)


def _check_row_groups(metadata: Any, columns: Sequence[Any], url: str) -> None:
    """Refuse a file by its footer if reading it would take too much memory or time."""
    for column in columns:
        if column.physical_type == "FIXED_LEN_BYTE_ARRAY" and column.length > _MAX_FIXED_BYTES:
            raise ManifestError(
                f"Values of column {column.path} of {url} have {column.length:,} bytes each; "
                f"the limit is {_MAX_FIXED_BYTES:,}."
            )
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        chunks = [group.column(at) for at in range(len(columns))]
        size = group.total_byte_size
        packed = sum(chunk.total_compressed_size for chunk in chunks)
        is_bomb = size > _BOMB_MIN_BYTES and size > _BOMB_RATIO * packed
        if size > _MAX_ROW_GROUP_BYTES or is_bomb:
            limit = _BOMB_MIN_BYTES if is_bomb else _MAX_ROW_GROUP_BYTES
            raise ManifestError(
                f"Row group {number + 1} of {url} has {size:,} bytes; write the file with "
                f"row groups of at most {limit:,} bytes."
            )
        nested = [chunk.num_values for chunk in chunks if "." in chunk.path_in_schema]
        if max(nested, default=0) > _MAX_NESTED_VALUES:
            raise ManifestError(
                f"Row group {number + 1} of {url} has {max(nested):,} values in nested columns; "
                f"the limit is {_MAX_NESTED_VALUES:,}."
            )


def _read_batches(
    pa: Any, names: list[str], batches: Iterable[Any], url: str, renames: Mapping[str, str]
) -> Iterator[Line]:
    columns = Columns(url, names, renames).names
    number = blank_rows = 0
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
            else:
                blank_rows = count_blank_row(blank_rows, url)


def _blank_long_cells(pa: Any, name: str, column: Any) -> Any:
    """Empty the cells of megabytes of a column without a meaning, which must not refuse rows."""
    if name in COLUMNS:
        return column
    import pyarrow.compute as pc  # noqa: PLC0415 - an extra

    if pa.types.is_dictionary(column.type):
        # Decoded, a long text that all rows share would take its size for each of them.
        values = _blank_long_cells(pa, name, column.dictionary)
        if pa.types.is_null(values.type):
            return pa.nulls(len(column))
        return pa.DictionaryArray.from_arrays(column.indices, values)
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        return pa.nulls(len(column))
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
    """Refuse long or many values before they are copied to Python objects."""
    values = total = 0
    for leaf in _find_leaves(pa, column):
        longest, size = _measure_text(pa, leaf)
        if longest > 4 * MAX_CELL_CHARACTERS:
            raise ManifestError(
                f"The manifest {url} has a cell of {longest:,} bytes in column {where}; the limit "
                f"is {MAX_CELL_CHARACTERS:,} characters."
            )
        values, total = values + len(leaf), total + size
    if pa.types.is_nested(column.type) and (
        values > _MAX_BATCH_VALUES or total > _MAX_BATCH_BYTES
    ):
        raise ManifestError(
            f"The manifest {url} has {values:,} nested values of {total:,} bytes in column "
            f"{where}; the limits are {_MAX_BATCH_VALUES:,} and {_MAX_BATCH_BYTES:,}."
        )


def _find_leaves(pa: Any, column: Any) -> Iterator[Any]:
    """Yield the columns without nesting that a column consists of."""
    if pa.types.is_struct(column.type):
        parts = column.flatten()
    elif pa.types.is_map(column.type):
        parts = [column.keys, column.items]
    elif pa.types.is_nested(column.type):
        parts = [column.flatten()]
    else:
        yield column
        return
    for part in parts:
        yield from _find_leaves(pa, part)


def _measure_text(pa: Any, column: Any) -> tuple[int, int]:
    """Return the length of the longest text of a column, and of all texts, in bytes."""
    import pyarrow.compute as pc  # noqa: PLC0415 - an extra

    texts = column.dictionary if pa.types.is_dictionary(column.type) else column
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary)
    if not any(is_text(texts.type) for is_text in (*kinds, pa.types.is_large_binary)):
        return 0, 0
    lengths = pc.binary_length(texts).cast(pa.int64())
    if texts is not column:
        lengths = lengths.take(column.indices)
    return pc.max(lengths).as_py() or 0, pc.sum(lengths).as_py() or 0


def _import_pyarrow(url: str) -> Any:
    try:
        import pyarrow  # noqa: PLC0415, ICN001 - an extra
    except ImportError:
        raise ManifestError(f"To read {url}, install `prefect-flux-kontext[parquet]`.") from None
    return pyarrow
