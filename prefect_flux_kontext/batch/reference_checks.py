"""Keys and checks of rows that depend on the content of their references."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

from prefect_flux_kontext.manifest.row import RefusedRow, Row
from prefect_flux_kontext.manifest.row_key import compute_row_key
from prefect_flux_kontext.references.location import non_public_references

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from prefect_flux_kontext.references.resolver import References

_BLOCK_ROWS = 250
"""Rows that are looked at together, so that many references are read in parallel."""


def with_row_keys(
    rows: Iterable[Row | RefusedRow], references: References
) -> Iterator[Row | RefusedRow]:
    """Yield the rows in order, with keys that depend on the content of their references.

    A row is refused if one of its references cannot be inspected. References on the web are not
    inspected.

    Args:
        rows: Rows of a manifest, whose keys depend only on the references' text.
        references: Inspects references, many at a time.
    """
    for block in split_into_blocks(rows):
        _set_row_keys(block, _find_own_references(block), references)
        yield from block


def with_reference_checks(
    rows: Iterable[Row | RefusedRow],
    references: References,
    is_to_be_paid: Callable[[Row], bool],
) -> Iterator[list[Row | RefusedRow]]:
    """Yield blocks of rows as `with_row_keys`, and refuse those the service would not accept.

    Args:
        rows: Rows of a manifest.
        references: Reads references, many at a time.
        is_to_be_paid: Whether a row is to be paid; the references of other rows are not read.
    """
    for block in split_into_blocks(rows):
        own = _find_own_references(block)
        _set_row_keys(block, own, references)
        read = {
            number: images
            for number, images in own.items()
            if isinstance(row := block[number], Row) and is_to_be_paid(row)
        }
        if read:
            flaws = references.find_content_problems(
                sorted({image for images in read.values() for image in images})
            )
            for number, images in read.items():
                problems = [flaws[image] for image in images if image in flaws]
                block[number] = _refuse_if_invalid(block[number], problems)
        yield block


def split_into_blocks(rows: Iterable[Row | RefusedRow]) -> Iterator[list[Row | RefusedRow]]:
    """Yield the rows in lists of at most 250."""
    rows = iter(rows)
    while block := list(itertools.islice(rows, _BLOCK_ROWS)):
        yield block


def _find_own_references(block: list[Row | RefusedRow]) -> dict[int, list[str]]:
    """Return the references of rows that are not on the web, by the row's place in the block."""
    return {
        number: own
        for number, row in enumerate(block)
        if isinstance(row, Row) and (own := non_public_references(row.image_urls))
    }


def _set_row_keys(
    block: list[Row | RefusedRow], own: Mapping[int, list[str]], references: References
) -> None:
    """Set the keys of rows with references of their own, and refuse those without a content."""
    if not own:
        return
    rows = {number: row for number in own if isinstance(row := block[number], Row)}
    versions = {
        image: row.version for number, row in rows.items() if row.version for image in own[number]
    }
    infos = references.identify(
        sorted({image for each in own.values() for image in each}), versions
    )
    for number, row in rows.items():
        problems = [problem for image in own[number] if (problem := infos[image].problem)]
        identities = {image: infos[image].identity for image in own[number]}
        keyed_row = replace(row, key=compute_row_key(row.request, identities, row.variant))
        block[number] = _refuse_if_invalid(keyed_row, problems)


def _refuse_if_invalid(row: Row | RefusedRow, problems: list[str]) -> Row | RefusedRow:
    return RefusedRow(row.id, row.line, "; ".join(problems), row.cells) if problems else row
