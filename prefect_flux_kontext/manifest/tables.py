"""Readers of Parquet files, tables in memory and lists of dicts; the type of a manifest source.

Tables in memory are read through Arrow's PyCapsule interface, and all tables in batches.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

from prefect_flux_kontext.errors import ManifestError
from prefect_flux_kontext.manifest.columns import (
    COLUMNS,
    MAX_CELL_CHARACTERS,
    Line,
    standardize_columns,
    to_cells,
)
from prefect_flux_kontext.manifest.formats import (
    check_cells,
    check_renames_used,
    count_blank_row,
    resolve_columns,
)
from prefect_flux_kontext.manifest.parquet_pages import (
    DELTA_BYTE_ARRAY,
    DELTA_LENGTH_BYTE_ARRAY,
    check_footer,
    read_pages,
)
from prefect_flux_kontext.references.remote import open_source

_BATCH_ROWS = 1_000
# A file that exceeds both is a decompression bomb: no real table compresses that well after it was
# encoded. Arrow may hold three times as much.
_BOMB_MIN_BYTES = 2**25
_BOMB_RATIO = 50
_MAX_FIXED_BYTES = 1_024
# A single row may hold all nested values of a row group, and is read at once.
_MAX_NESTED_VALUES = 5_000_000
# Many rows can have the same long text.
_MAX_CHARACTERS = 2**28
_MAX_CHARACTERS_A_BYTE = 1_000
# Texts of a batch that may each have all of the one before it.
_MAX_DELTA_BYTES = 2**23
_MAX_DELTA_RATIO = 20
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
        check_footer(file)
        parquet = pq.ParquetFile(file, pre_buffer=False)
        metadata = parquet.metadata
        columns = [parquet.schema.column(at) for at in range(metadata.num_columns)]
        _check_columns(columns, url)
        stored = file.seek(0, io.SEEK_END)
        delta_pages = _check_pages(file, metadata, stored, url)
        texts = [
            column.path
            for at, column in enumerate(columns)
            if column.physical_type == "BYTE_ARRAY" and at not in delta_pages
        ]
        # Each text of a page can be as long as the page.
        limit = max(_MAX_DELTA_BYTES, _MAX_DELTA_RATIO * stored)
        batch_rows = limit // max(1, sum(delta_pages.values()))
        names = parquet.schema_arrow.names
        file.seek(0)
        parquet = pq.ParquetFile(file, read_dictionary=texts, pre_buffer=False)
        batches = parquet.iter_batches(max(1, min(_BATCH_ROWS, batch_rows)))
        limit = max(_MAX_CHARACTERS, _MAX_CHARACTERS_A_BYTE * stored)
        count = yield from _read_batches(pa, names, batches, url, renames, limit)
        if count != metadata.num_rows:
            raise ManifestError(
                f"The manifest {url} has {count:,} rows, and its footer says "
                f"{metadata.num_rows:,}; the file is damaged."
            )


def _check_columns(columns: Sequence[Any], url: str) -> None:
    for column in columns:
        if column.physical_type == "FIXED_LEN_BYTE_ARRAY" and column.length > _MAX_FIXED_BYTES:
            raise ManifestError(
                f"Values of column {column.path} of {url} have {column.length:,} bytes each; "
                f"the limit is {_MAX_FIXED_BYTES:,}."
            )


def _check_pages(file: Any, metadata: Any, stored: int, url: str) -> dict[int, int]:
    """Refuse a file if reading it would take too much memory or time.

    Returns:
        The columns that Arrow cannot read as dictionaries, and for each the size of its longest
        page if its texts repeat those before them, else 0.
    """
    delta_pages: dict[int, int] = {}
    read = total = cells = 0
    for number, at in itertools.product(
        range(metadata.num_row_groups), range(metadata.num_columns)
    ):
        chunk = metadata.row_group(number).column(at)
        values = 0
        for page in read_pages(file, chunk):
            read += page.stored
            total += page.size
            cells += page.values
            values += page.values
            if page.encoding in (DELTA_BYTE_ARRAY, DELTA_LENGTH_BYTE_ARRAY):
                longest = page.size if page.encoding == DELTA_BYTE_ARRAY else 0
                delta_pages[at] = max(delta_pages.get(at, 0), longest)
            if read > stored:
                raise ManifestError(f"The manifest {url} is damaged: it has pages that overlap.")
            if total > _BOMB_MIN_BYTES and total > _BOMB_RATIO * stored:
                raise ManifestError(
                    f"The manifest {url} has {stored:,} bytes and unpacks to more than "
                    f"{_BOMB_MIN_BYTES:,} bytes and {_BOMB_RATIO} times its size; write it with "
                    "dictionaries, or without compression."
                )
        check_cells(cells, stored, url)
        if "." in chunk.path_in_schema and values > _MAX_NESTED_VALUES:
            raise ManifestError(
                f"Row group {number + 1} of {url} has {values:,} values in nested columns; the "
                f"limit is {_MAX_NESTED_VALUES:,}."
            )
    return delta_pages


def _read_batches(
    pa: Any,
    names: list[str],
    batches: Iterable[Any],
    url: str,
    renames: Mapping[str, str],
    max_characters: float = math.inf,
) -> Generator[Line, None, int]:
    """Yield the rows of batches, and return their number."""
    columns = standardize_columns(url, names, renames)
    number = blank_rows = characters = 0
    for batch in batches:
        rows = f"between rows {number + 1} and {number + len(batch)}"
        characters += _check_nested(pa, batch, rows, url)
        column_values = [
            _read_values(pa, _blank_long_cells(pa, name, column), f"{name}, {rows}", url)
            for name, column in zip(columns, batch.columns, strict=True)
        ]
        texts = (value for values in column_values for value in values)
        characters += sum(len(text) for text in texts if isinstance(text, str))
        if characters > max_characters:
            raise ManifestError(
                f"The manifest {url} has more than {_MAX_CHARACTERS:,} characters and "
                f"{_MAX_CHARACTERS_A_BYTE:,} times its size; leave out columns of long texts."
            )
        for values in zip(*column_values, strict=True):
            number += 1
            cells, problem = to_cells(dict(zip(columns, values, strict=True)))
            if any(cells.values()) or problem:
                yield Line(number, cells, problem)
            else:
                blank_rows = count_blank_row(blank_rows, url)
    return number


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
    """Refuse long values before they are copied to Python objects."""
    longest = max((_measure_text(pa, leaf)[0] for leaf in _find_leaves(pa, column)), default=0)
    if longest > 4 * MAX_CELL_CHARACTERS:
        raise ManifestError(
            f"The manifest {url} has a cell of {longest:,} bytes in column {where}; the limit "
            f"is {MAX_CELL_CHARACTERS:,} characters."
        )


def _check_nested(pa: Any, batch: Any, rows: str, url: str) -> int:
    """Refuse many nested values before they are copied, and return the bytes of their texts."""
    leaves = [
        leaf
        for column in batch.columns
        if pa.types.is_nested(column.type)
        for leaf in _find_leaves(pa, column)
    ]
    values, total = sum(map(len, leaves)), sum(_measure_text(pa, leaf)[1] for leaf in leaves)
    if values > _MAX_BATCH_VALUES or total > _MAX_BATCH_BYTES:
        raise ManifestError(
            f"The manifest {url} has {values:,} nested values of {total:,} bytes {rows}; the "
            f"limits are {_MAX_BATCH_VALUES:,} and {_MAX_BATCH_BYTES:,}."
        )
    return total


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
