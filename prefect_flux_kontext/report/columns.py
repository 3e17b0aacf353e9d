"""The columns of the result manifest: ours with their types, and what yours are named there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

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
    "price": "number",
    "attempts": "whole",
    "already": "truth",
    "style": "text",
    "prompt": "text",
    "references": "texts",
    "mode": "text",
    "aspect_ratio": "text",
    "output_format": "text",
    "provider": "text",
    "key": "text",
    "run": "text",
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
        "truth": pa.bool_(),
        "moment": pa.timestamp("ms", tz="UTC"),
    }
    ours = [pa.field(name, kinds[kind]) for name, kind in COLUMNS.items()]
    return pa.schema([*ours, *(pa.field(name, pa.string()) for name in list(own)[:_MOST_OWN])])
