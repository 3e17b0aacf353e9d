"""Rows whose references are not on the web: their keys, and which of them cannot be paid for."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

from prefect_flux_kontext.keys import row_key
from prefect_flux_kontext.manifest.rows import RefusedRow, Row
from prefect_flux_kontext.references.kinds import not_on_the_web

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from prefect_flux_kontext.references.known import Look
    from prefect_flux_kontext.references.resolving import References

_BLOCK = 250


def keyed(rows: Iterable[Row | RefusedRow], references: References) -> Iterator[Row | RefusedRow]:
    """The rows in order, with keys that tell what their references hold.

    A row is refused when a reference of it cannot be looked at.

    Args:
        rows: Rows of a manifest, whose keys know no more than the references' text.
        references: Looks at them, many at a time.
    """
    for block in _blocks(rows):
        own = {image for row in block for image in _own(row)}
        if not own:
            yield from block
            continue
        versions = {
            image: row.version
            for row in block
            if isinstance(row, Row) and row.version
            for image in _own(row)
        }
        looks = references.look_at(sorted(own), versions)
        for row in block:
            yield _keyed(row, looks)


def checked(
    rows: Iterable[Row | RefusedRow],
    references: References,
    is_to_be_paid: Callable[[Row], bool],
) -> Iterator[Row | RefusedRow]:
    """The rows in order, as `keyed`, with those refused that the service would not take.

    Args:
        rows: Rows of a manifest.
        references: Reads them, many at a time.
        is_to_be_paid: Says of a row whether it is; the references of others are not read.
    """
    for block in _blocks(keyed(rows, references)):
        read = {
            number: own
            for number, row in enumerate(block)
            if (own := _own(row)) and isinstance(row, Row) and is_to_be_paid(row)
        }
        if not read:
            yield from block
            continue
        flaws = references.flaws(sorted({image for own in read.values() for image in own}))
        for number, row in enumerate(block):
            yield _refused(row, [flaws[image] for image in read.get(number, ()) if image in flaws])


def _blocks(rows: Iterable[Row | RefusedRow]) -> Iterator[list[Row | RefusedRow]]:
    rows = iter(rows)
    while block := list(itertools.islice(rows, _BLOCK)):
        yield block


def _own(row: Row | RefusedRow) -> list[str]:
    return not_on_the_web(row.request.image_urls) if isinstance(row, Row) else []


def _keyed(row: Row | RefusedRow, looks: Mapping[str, Look]) -> Row | RefusedRow:
    own = _own(row)
    if not isinstance(row, Row) or not own:
        return row
    problems = [problem for image in own if (problem := looks[image].problem)]
    identities = {image: looks[image].identity for image in own}
    return _refused(replace(row, key=row_key(row.request, identities)), problems)


def _refused(row: Row | RefusedRow, problems: list[str]) -> Row | RefusedRow:
    return RefusedRow(row.id, row.line, "; ".join(problems), row.cells) if problems else row
