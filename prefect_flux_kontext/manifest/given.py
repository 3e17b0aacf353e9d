"""Rows given directly in a flow of one's own: a list of dicts, or a table in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

from prefect_flux_kontext.errors import ManifestError
from prefect_flux_kontext.manifest.arrow import table_lines
from prefect_flux_kontext.manifest.json_lines import check_seen, columns_of_object
from prefect_flux_kontext.manifest.lines import Line, as_cells

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


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


def given_lines(
    given: Sequence[dict[Any, Any]] | Table, renamed: Mapping[str, str]
) -> Iterator[Line]:
    """The rows, numbered from 1.

    Raises:
        ManifestError: They hold what no manifest holds.
        Exception: What Arrow raises.
    """
    if isinstance(given, Table):
        yield from table_lines(given.data, renamed)
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
        cells, problem = as_cells(dict(zip(columns, row.values(), strict=True)))
        yield Line(number, cells, problem)
    check_seen(url, unseen)
