"""The manifest: streams rows from a file, a folder of images, a list or a table."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from prefect_flux_kontext.errors import ManifestError
from prefect_flux_kontext.manifest.columns import COLUMNS, looks_like_image
from prefect_flux_kontext.manifest.directory import ImageFolder, find_image_folder
from prefect_flux_kontext.manifest.formats import (
    DELIMITERS,
    as_manifest_error,
    detect_format,
    detect_kind,
    read_delimited,
    read_json_lines,
)
from prefect_flux_kontext.manifest.row import (
    RefusedRow,
    Row,
    RowDefaults,
    expand_line,
    resolve_row_defaults,
)
from prefect_flux_kontext.manifest.tables import (
    normalize_source,
    read_in_memory_rows,
    read_parquet,
)
from prefect_flux_kontext.redaction import redact_url
from prefect_flux_kontext.references.rights import find_rights
from prefect_flux_kontext.storage.temp_db import DuplicateIndex

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from prefect_flux_kontext.manifest.columns import Line
    from prefect_flux_kontext.manifest.formats import ManifestFormat
    from prefect_flux_kontext.references.rights import Rights

MAX_ROWS = 1_000_000
"""Bounds the time that a small hostile file can take. At $0.03 a row, a million rows cost
$30,000."""

_BLOCK_ROWS = 250
"""Rows whose names are checked together."""

MAX_REFUSED_ROWS = 50_000
"""Bounds the same for rows that are refused, unless more rows than that are valid."""


@dataclass(frozen=True)
class Manifest:
    """A manifest, and the defaults for its rows.

    Attributes:
        source: A path or fsspec URL of a file, or of a folder, prefix or glob of images, or the
            rows: a list of dicts, or a table with Arrow's PyCapsule interface. The file name
            decides the format, else the content type or the content. Text may be compressed.
        prompt: The prompt for rows without one.
        columns: Standard column name to the manifest's name, such as `{"image": "photo_url"}`.
        styles: Names of styles and paths of style files. A row that names no style is made once
            in each of them.
        names: The template of output names, such as `{style}/{id}.{ext}`.
        parameters: Mode, aspect ratio, output format and provider of rows that do not set them.
        output: Folder of the output, which is skipped when a folder of images is read.
        folder: Base folder of relative reference paths. None means the manifest's own folder;
            a manifest that is not local can then not name local files.
        rights: Which references the rows may name. None means those of the source.
        format: The format of the file; None for that of its name, content type or content.
        text_to_image: Rows without a reference are meant, though other columns look like images.
        base_url: The service, which must reach references on the web; None for no check.
        name: What messages call rows that are given in memory.
        lines: Their line numbers. None numbers them from 1.
        needs_style_names: The styles are only for rows that name them.
        counts: Number of `lines` that were last read, with the header.
    """

    source: Any = field(repr=False)
    prompt: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    styles: str | Sequence[str] | None = None
    names: str | None = None
    output: str | None = None
    parameters: Mapping[str, str | None] = field(default_factory=dict)
    folder: str | None = None
    rights: Rights | None = None
    format: ManifestFormat | None = None
    text_to_image: bool = False
    base_url: str | None = None
    name: str = "<rows>"
    lines: Sequence[int] | None = None
    needs_style_names: bool = False
    counts: Counter[str] = field(default_factory=Counter, init=False, compare=False)

    @property
    def url(self) -> str:
        """The manifest's path or URL, for messages."""
        if isinstance(self.source, list | tuple):
            return self.name
        return redact_url(str(self.source))

    @property
    def skipped(self) -> Counter[str]:
        """Number of files in a folder that are no rows, by reason, as of its last read."""
        return self._folder.skipped if self._folder else Counter()

    def rows(self) -> Iterator[Row | RefusedRow]:
        """Yield all rows in order, valid or refused. Each call reads the manifest again.

        Raises:
            ConfigurationError: The default prompt, the styles or the template of output names
                are invalid.
            ManifestError: The manifest cannot be read, or an invalid line is reached.
        """
        defaults = self._defaults
        count = refused = 0
        with as_manifest_error(self.url), DuplicateIndex() as names:
            source = normalize_source(self.source)
            folder = self._folder
            # What a folder holds is known after its first line.
            lines = self._read_lines(source)
            first = next(lines, None)
            is_local_images = folder is not None and folder.has_images and folder.is_local
            rights = self.rights or find_rights(
                source, folder.root if folder is not None and is_local_images else None
            )
            if self.folder is not None:
                rights = rights._replace(folder=self.folder)
            defaults = defaults._replace(rights=rights)
            lines = itertools.chain([first] if first else [], lines)
            for block in _split_into_blocks(self._expand(lines, defaults)):
                for row in _check_names(block, names, count):
                    count += 1
                    if count > MAX_ROWS:
                        raise ManifestError(
                            f"The manifest {self.url} has more than {MAX_ROWS:,} rows; split it."
                        )
                    if isinstance(row, RefusedRow):
                        refused += 1
                        self._check_refused(row, refused, count)
                    yield row

    def _expand(self, lines: Iterable[Line], defaults: RowDefaults) -> Iterator[Row | RefusedRow]:
        for line in lines:
            self.counts["lines"] = line.number
            if not self.text_to_image:
                self._check_images_used(line)
            yield from expand_line(line, defaults)

    def _check_images_used(self, line: Line) -> None:
        """Refuse a line without a reference if another column looks like one."""
        cells = line.cells
        if cells.get("image", "").strip() or cells.get("images", "").strip():
            return
        for name, text in cells.items():
            if name not in COLUMNS and looks_like_image(name, text.strip()):
                raise ManifestError(
                    f"Line {line.number} of {self.url} has no reference, and its column {name!r} "
                    f"looks like images ({text.strip()[:100]!r}): use --columns image={name} (in "
                    "a flow, columns). If rows without a reference are meant, give "
                    "--text-to-image (text_to_image)."
                )

    def _check_refused(self, row: RefusedRow, refused: int, count: int) -> None:
        if refused > MAX_REFUSED_ROWS and refused > count // 2:
            raise ManifestError(
                f"More than {MAX_REFUSED_ROWS:,} of the first {count:,} rows of {self.url} are "
                f"invalid, and fewer are valid. The last is on line {row.line}: {row.reason}"
            )

    @cached_property
    def _defaults(self) -> RowDefaults:
        defaults = resolve_row_defaults(self.prompt, self.styles, self.names, self.parameters)
        if self.needs_style_names:
            defaults = defaults._replace(styles=defaults.styles._replace(chosen=()))
        return defaults._replace(base_url=self.base_url)

    @cached_property
    def _folder(self) -> ImageFolder | None:
        source = normalize_source(self.source)
        return find_image_folder(source, self.output) if isinstance(source, str) else None

    def _read_lines(self, source: Any) -> Iterator[Line]:
        unknown = set(self.columns) - COLUMNS
        if unknown:
            raise ManifestError(
                f"Cannot map a column to {', '.join(map(repr, sorted(unknown)))}; the standard "
                f"columns are {', '.join(sorted(COLUMNS))}."
            )
        if not isinstance(source, str):
            return read_in_memory_rows(source, self.columns, self.name, self.lines)
        if "::" in source:
            raise ManifestError(
                f"The manifest {source} chains several filesystems; use a single URL."
            )
        if self._folder is not None:
            return self._read_folder(self._folder)
        return self._read_file(source)

    def _read_file(self, source: str) -> Iterator[Line]:
        kind = self.format or detect_kind(source)
        if kind == "parquet":
            if detect_format(source)[1]:
                raise ManifestError(
                    f"The manifest {source} is a compressed Parquet file; decompress it first."
                )
            return read_parquet(source, self.columns)
        if kind == "json":
            return read_json_lines(source, self.columns)
        is_given = self.format is not None
        return read_delimited(source, self.columns, DELIMITERS[kind], is_given=is_given)

    def _read_folder(self, folder: ImageFolder) -> Iterator[Line]:
        for line in folder.read_lines():
            if line.number == 1:
                self._check_images_allowed()
            yield line
        if folder.has_images:
            return
        number = 0
        for url, columns in folder.list_tables():
            start = number
            for line in self._read_file(url):
                number = start + line.number
                yield line._replace(number=number, cells=columns | line.cells)

    def _check_images_allowed(self) -> None:
        if self.columns:
            raise ManifestError(
                f"{self.url} is a folder of images, which has no columns; remove --columns (in a "
                "flow, columns)."
            )
        if self.prompt is None and not self._defaults.styles.chosen:
            raise ManifestError(
                f"The images of {self.url} need a prompt or a style; give --prompt or --style (in "
                "a flow, prompt or styles)."
            )


def _split_into_blocks(
    rows: Iterable[Row | RefusedRow],
) -> Iterator[list[Row | RefusedRow]]:
    """Yield blocks of rows, at the end the rows before an error too."""
    block: list[Row | RefusedRow] = []
    try:
        for row in rows:
            block.append(row)
            if len(block) == _BLOCK_ROWS:
                yield block
                block = []
    except Exception:
        yield block
        raise
    yield block


def _check_names(
    rows: list[Row | RefusedRow], names: DuplicateIndex, before: int
) -> list[Row | RefusedRow]:
    """Return the rows, and refuse those that have the output name of an earlier row."""
    valid = [(number, row) for number, row in enumerate(rows) if isinstance(row, Row)]
    # One line can give several rows. The number tells them apart; messages name the line.
    positions = [row.line << 32 | before + number for number, row in valid]
    found = names.add_all([row.name.casefold() for _, row in valid], positions)
    if found is positions:
        return rows
    checked = rows.copy()
    for (number, row), own, first in zip(valid, positions, found, strict=True):
        if own != first:
            checked[number] = _refuse_name(row, first >> 32)
    return checked


def _refuse_name(row: Row, first_line: int) -> RefusedRow:
    if row.style is None and "output" not in row.cells:
        reason = f"duplicate id {row.id!r:.80}, first used on line {first_line}; ids name files"
    elif first_line == row.line:
        reason = f"two styles of the line have the same output name {row.name!r:.80}"
    else:
        reason = f"duplicate output name {row.name!r:.80}, first used on line {first_line}"
    return RefusedRow(row.id, row.line, reason, row.cells)
