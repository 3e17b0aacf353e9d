"""Reading a manifest: a CSV file on any fsspec filesystem, streamed, never held whole."""

from __future__ import annotations

import csv
import hashlib
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import fsspec

from prefect_flux_kontext.errors import ManifestError
from prefect_flux_kontext.manifest.rows import PARAMETERS, RefusedRow, Row, make_row
from prefect_flux_kontext.storage import safe_name

if TYPE_CHECKING:
    from collections.abc import Iterator

_PROBLEMS_TOLD = 20
_COLUMNS = {"id", "image", *PARAMETERS}


@dataclass(frozen=True)
class Manifest:
    """A manifest and the prompt for rows that have none of their own.

    Attributes:
        url: Path or fsspec URL of a CSV file in UTF-8 with a header line. Columns it knows:
            `id`, `image`, `prompt`, `mode`, `aspect_ratio`, `output_format`, `provider`.
        prompt: The prompt for rows without one.
    """

    url: str
    prompt: str | None = None

    def rows(self) -> Iterator[Row | RefusedRow]:
        """All rows in order, made or refused one by one. Reads the file anew each time.

        Raises:
            ManifestError: The file cannot be read as a manifest, at the latest where it breaks.
        """
        names: dict[bytes, int] = {}
        for line, cells, surplus in self._lines():
            row = make_row(line, cells, prompt=self.prompt)
            if surplus:
                row = RefusedRow(
                    row.id,
                    line,
                    f"{surplus} cells more than there are columns; quote cells that hold commas",
                    cells,
                )
            name = hashlib.blake2b(safe_name(row.id).casefold().encode(), digest_size=8).digest()
            first = names.setdefault(name, line)
            if first != line:
                row = RefusedRow(
                    row.id,
                    line,
                    f"id {row.id!r:.80} is on line {first} already; ids name files",
                    cells,
                )
            yield row

    def check(self) -> ManifestCheck:
        """Read it once from end to end, before anything is paid.

        Raises:
            ManifestError: It cannot be read to its end, or has no rows.
        """
        check = ManifestCheck()
        for row in self.rows():
            check.rows += 1
            if isinstance(row, RefusedRow):
                check.refused += 1
                if len(check.problems) < _PROBLEMS_TOLD:
                    check.problems.append(row)
        if not check.rows:
            raise ManifestError(f"The manifest {self.url} has no rows.")
        return check

    def _lines(self) -> Iterator[tuple[int, dict[str, str], int]]:
        try:
            # What is not UTF-8 becomes surrogates, so that the line it is on can be told.
            with fsspec.open(
                self.url, "rt", encoding="utf-8-sig", errors="surrogateescape", newline=""
            ) as file:
                yield from self._cells(csv.reader(file, strict=True))
        except ManifestError:
            raise
        except FileNotFoundError:
            raise ManifestError(f"There is no manifest at {self.url}.") from None
        except Exception as error:  # noqa: BLE001 - each filesystem has errors of its own
            raise ManifestError(f"The manifest {self.url} cannot be read: {error}") from None

    def _cells(self, reader: Any) -> Iterator[tuple[int, dict[str, str], int]]:
        try:
            header = [name.strip() for name in self._checked(next(reader, []), 1)]
            self._check_header(header)
            for values in reader:
                # Spreadsheets end a table with empty rows and columns.
                if any(text.strip() for text in self._checked(values, reader.line_num)):
                    surplus = sum(1 for text in values[len(header) :] if text.strip())
                    yield reader.line_num, dict(zip(header, values, strict=False)), surplus
        except csv.Error as error:
            raise ManifestError(
                f"Line {reader.line_num} of {self.url} is not CSV: {error}."
            ) from None

    def _checked(self, values: list[str], line: int) -> list[str]:
        try:
            "".join(values).encode()
        except UnicodeEncodeError:
            raise ManifestError(
                f"Line {line} of {self.url} is not in UTF-8; save the manifest as UTF-8."
            ) from None
        return values

    def _check_header(self, header: list[str]) -> None:
        twice = {name for name in header if name and header.count(name) > 1}
        if twice:
            raise ManifestError(f"The manifest {self.url} has a column twice: {sorted(twice)}.")
        for name in header:
            meant = re.sub(r"[\s-]+", "_", name.casefold())
            if meant in _COLUMNS and meant != name:
                # It would be taken for a column of the user's own, and the default paid for.
                raise ManifestError(
                    f"The manifest {self.url} has a column {name!r}; spell it `{meant}`."
                )
        if not {"image", "prompt"} & set(header):
            raise ManifestError(
                f"The manifest {self.url} has neither a column `image` nor `prompt`; its first "
                f"line names {', '.join(header)[:200] or 'nothing'}."
            )


@dataclass
class ManifestCheck:
    """What a manifest holds: rows in all, how many are refused, and the first of those."""

    rows: int = 0
    refused: int = 0
    problems: list[RefusedRow] = field(default_factory=list)
