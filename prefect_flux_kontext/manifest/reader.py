"""Reading a manifest of any kind, streamed, never held whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from prefect_flux_kontext.errors import ManifestError
from prefect_flux_kontext.manifest.columns import COLUMNS
from prefect_flux_kontext.manifest.directory import ImageFolder, find_image_folder
from prefect_flux_kontext.manifest.duplicates import DuplicateIndex
from prefect_flux_kontext.manifest.formats import (
    as_manifest_error,
    detect_format,
    read_delimited,
    read_json_lines,
)
from prefect_flux_kontext.manifest.row import (
    RefusedRow,
    RowDefaults,
    expand_line,
    resolve_row_defaults,
)
from prefect_flux_kontext.manifest.tables import read_given_rows, read_parquet, source
from prefect_flux_kontext.references.location import manifest_folder

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from prefect_flux_kontext.manifest.columns import Line
    from prefect_flux_kontext.manifest.row import Row

MOST_ROWS = 1_000_000
"""Rows of a manifest, so that a trap of a few bytes is not read for ever: at $0.03 a row a
million cost $30,000."""

_TABS = (".tsv", ".tab")
_JSON_LINES = (".jsonl", ".ndjson", ".json")
_PARQUET = (".parquet", ".pq")


@dataclass(frozen=True)
class Manifest:
    """A manifest, and what is the same for all its rows.

    Attributes:
        source: A path or fsspec URL, or the rows themselves: a list of dicts, or a table that
            speaks Arrow's interface. A file's kind is told by its name: `.tsv`, `.jsonl`,
            `.parquet`, else CSV; text may be compressed (`.gz`, `.zst`, `.bz2`, `.xz`).
            A folder, prefix or glob of images is a manifest as well.
            Columns it knows: `id`, `image`, `images`, `prompt`, `style`, `mode`,
            `aspect_ratio`, `output_format`, `provider`, `output`; others are kept.
        prompt: The prompt for rows without one.
        columns: The manifest's own names for columns, such as `{"image": "photo_url"}`.
        styles: Names of styles and files of styles, for rows that name no style: each such row
            is made once in each of them.
        names: The template of output names, such as `{style}/{id}.{ext}`.
        output: Where the images go, so that those of a folder are not taken for new ones.
        folder: Where relative paths of references start. None: the manifest's own folder; a
            manifest that is not local may then not name local files.
    """

    source: Any
    prompt: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    styles: str | Sequence[str] | None = None
    names: str | None = None
    output: str | None = None
    folder: str | None = None

    @property
    def url(self) -> str:
        """Where it is, for messages."""
        if isinstance(self.source, list | tuple):
            return "<rows>"
        return str(self.source)

    @property
    def left_out(self) -> int:
        """Files of a folder that were no images by their names, when it was last read."""
        return self._folder.left_out if self._folder else 0

    def rows(self) -> Iterator[Row | RefusedRow]:
        """All rows in order, made or refused one by one. Reads the manifest anew each time.

        Raises:
            ConfigurationError: The prompt, the styles or the names for all rows are wrong.
            ManifestError: It cannot be read as a manifest, at the latest where it breaks.
        """
        recipe = self._recipe
        made = 0
        with as_manifest_error(self.url), DuplicateIndex() as names:
            given = source(self.source)
            recipe = recipe._replace(folder=self.folder or manifest_folder(given))
            for line in self._lines(given):
                for row in expand_line(line, recipe):
                    made += 1
                    if made > MOST_ROWS:
                        raise ManifestError(
                            f"The manifest {self.url} has more than {MOST_ROWS:,} rows; divide it."
                        )
                    yield row if isinstance(row, RefusedRow) else _named_alone(row, names, made)

    @cached_property
    def _recipe(self) -> RowDefaults:
        return resolve_row_defaults(self.prompt, self.styles, self.names)

    @cached_property
    def _folder(self) -> ImageFolder | None:
        given = source(self.source)
        return find_image_folder(given, self.output) if isinstance(given, str) else None

    def _lines(self, given: Any) -> Iterator[Line]:
        unknown = set(self.columns) - COLUMNS
        if unknown:
            raise ManifestError(
                f"There is no column {sorted(unknown)} to take another as; there are "
                f"{', '.join(sorted(COLUMNS))}."
            )
        if not isinstance(given, str):
            return read_given_rows(given, self.columns)
        if "::" in given:
            raise ManifestError(f"The manifest {given} chains several filesystems; give one URL.")
        if self._folder is not None:
            return self._images(self._folder)
        kind, compression = detect_format(given)
        if kind in _PARQUET:
            if compression:
                raise ManifestError(f"The manifest {given} is Parquet, compressed; unpack it.")
            return read_parquet(given, self.columns)
        if kind in _JSON_LINES:
            return read_json_lines(given, self.columns)
        return read_delimited(given, self.columns, "\t" if kind in _TABS else ",")

    def _images(self, folder: ImageFolder) -> Iterator[Line]:
        if self.columns:
            raise ManifestError(f"{self.url} is a folder of images, which has no columns.")
        if self.prompt is None and not self._recipe.styles.chosen:
            raise ManifestError(
                f"The images of {self.url} need a prompt or styles for all of them: give --prompt "
                "or --style (in a flow, prompt or styles)."
            )
        return folder.lines()


def _named_alone(row: Row, names: DuplicateIndex, number: int) -> Row | RefusedRow:
    """The row, or why not where an earlier one has its name."""
    # Several rows of a line have a number each, and the line is what a person is told.
    first = names.first(row.name.casefold().encode(), row.line << 32 | number)
    if first == row.line << 32 | number:
        return row
    if row.style is None and "output" not in row.cells:
        told = f"id {row.id!r:.80} is on line {first >> 32} already; ids name files"
    elif first >> 32 == row.line:
        told = f"two styles of the line have one output name, {row.name!r:.80}"
    else:
        told = f"output name {row.name!r:.80} is that of line {first >> 32} already"
    return RefusedRow(row.id, row.line, told, row.cells)
