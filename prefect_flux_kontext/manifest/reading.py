"""Reading a manifest of any kind, streamed, never held whole."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prefect_flux_kontext.errors import ManifestError
from prefect_flux_kontext.manifest.arrow import parquet_lines
from prefect_flux_kontext.manifest.delimited import delimited_lines
from prefect_flux_kontext.manifest.given import given_lines, source
from prefect_flux_kontext.manifest.json_lines import json_lines
from prefect_flux_kontext.manifest.lines import COLUMNS
from prefect_flux_kontext.manifest.opening import kind_of, told_as_manifest_error
from prefect_flux_kontext.manifest.rows import RefusedRow, Row, make_row
from prefect_flux_kontext.manifest.seen import Seen
from prefect_flux_kontext.references.kinds import folder_of
from prefect_flux_kontext.storage import safe_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from prefect_flux_kontext.manifest.lines import Line

MOST_ROWS = 1_000_000
"""Rows of a manifest, so that a trap of a few bytes is not read for ever: at $0.03 a row a
million cost $30,000."""

_TABS = (".tsv", ".tab")
_JSON_LINES = (".jsonl", ".ndjson", ".json")
_PARQUET = (".parquet", ".pq")


@dataclass(frozen=True)
class Manifest:
    """A manifest and the prompt for rows that have none of their own.

    Attributes:
        source: A path or fsspec URL, or the rows themselves: a list of dicts, or a table that
            speaks Arrow's interface. A file's kind is told by its name: `.tsv`, `.jsonl`,
            `.parquet`, else CSV; text may be compressed (`.gz`, `.zst`, `.bz2`, `.xz`).
            Columns it knows: `id`, `image`, `images`, `prompt`, `mode`, `aspect_ratio`,
            `output_format`, `provider`; others are kept.
        prompt: The prompt for rows without one.
        columns: The manifest's own names for columns, such as `{"image": "photo_url"}`.
        folder: Where relative paths of references start. None: the manifest's own folder; a
            manifest that is not local may then not name local files.
    """

    source: Any
    prompt: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    folder: str | None = None

    @property
    def url(self) -> str:
        """Where it is, for messages."""
        if isinstance(self.source, list | tuple):
            return "<rows>"
        return str(self.source)

    def rows(self) -> Iterator[Row | RefusedRow]:
        """All rows in order, made or refused one by one. Reads the manifest anew each time.

        Raises:
            ManifestError: It cannot be read as a manifest, at the latest where it breaks.
        """
        with told_as_manifest_error(self.url), Seen() as names:
            given = source(self.source)
            folder = self.folder or folder_of(given)
            for number, line in enumerate(self._lines(given), start=1):
                if number > MOST_ROWS:
                    raise ManifestError(
                        f"The manifest {self.url} has more than {MOST_ROWS:,} rows; divide it."
                    )
                row = make_row(line.number, line.cells, prompt=self.prompt, folder=folder)
                if line.problem:
                    row = RefusedRow(row.id, line.number, line.problem, line.cells)
                name = unicodedata.normalize(
                    "NFC", safe_name(unicodedata.normalize("NFC", row.id))
                )
                first = names.first(name.casefold().encode(), line.number)
                if first != line.number and not line.problem:
                    row = RefusedRow(
                        row.id,
                        line.number,
                        f"id {row.id!r:.80} is on line {first} already; ids name files",
                        line.cells,
                    )
                yield row

    def _lines(self, given: Any) -> Iterator[Line]:
        unknown = set(self.columns) - COLUMNS
        if unknown:
            raise ManifestError(
                f"There is no column {sorted(unknown)} to take another as; there are "
                f"{', '.join(sorted(COLUMNS))}."
            )
        if not isinstance(given, str):
            return given_lines(given, self.columns)
        if "::" in given:
            raise ManifestError(f"The manifest {given} chains several filesystems; give one URL.")
        kind, compression = kind_of(given)
        if kind in _PARQUET:
            if compression:
                raise ManifestError(f"The manifest {given} is Parquet, compressed; unpack it.")
            return parquet_lines(given, self.columns)
        if kind in _JSON_LINES:
            return json_lines(given, self.columns)
        return delimited_lines(given, self.columns, "\t" if kind in _TABS else ",")
