"""Rows whose references are not on the web: their keys, and which of them cannot be paid for."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from prefect_flux_kontext.batch.index import LedgerIndex, PlannedAction
from prefect_flux_kontext.batch.summary import BatchSummary
from prefect_flux_kontext.errors import ManifestError
from prefect_flux_kontext.manifest.duplicates import DuplicateIndex
from prefect_flux_kontext.manifest.row import RefusedRow, Row
from prefect_flux_kontext.manifest.row_key import compute_row_key
from prefect_flux_kontext.references.location import non_public_references

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from prefect_flux_kontext.batch.policy import RowOptions
    from prefect_flux_kontext.ledger.store import RecordStore
    from prefect_flux_kontext.manifest.reader import Manifest
    from prefect_flux_kontext.references.cache import ReferenceInfo
    from prefect_flux_kontext.references.resolver import References

_BLOCK = 250


def with_row_keys(
    rows: Iterable[Row | RefusedRow], references: References
) -> Iterator[Row | RefusedRow]:
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


def with_reference_checks(
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
    for block in _blocks(with_row_keys(rows, references)):
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
    return non_public_references(row.request.image_urls) if isinstance(row, Row) else []


def _keyed(row: Row | RefusedRow, looks: Mapping[str, ReferenceInfo]) -> Row | RefusedRow:
    own = _own(row)
    if not isinstance(row, Row) or not own:
        return row
    problems = [problem for image in own if (problem := looks[image].problem)]
    identities = {image: looks[image].identity for image in own}
    return _refused(replace(row, key=compute_row_key(row.request, identities)), problems)


def _refused(row: Row | RefusedRow, problems: list[str]) -> Row | RefusedRow:
    return RefusedRow(row.id, row.line, "; ".join(problems), row.cells) if problems else row


_KEPT = 1_000
_TOLD = 20
_GENERATION = 30.0
"""Seconds that the service takes for an image, by its own reference page."""


@dataclass(kw_only=True)
class Plan:
    """What a run would do.

    Attributes:
        url: The manifest.
        rows: Rows in all, refused ones among them.
        left_out: Files of a folder that are no images by their names.
        refused: Rows that are wrong.
        problems: The first thousand of them.
        equal: Rows that ask for what another row asks for: paid once.
        standings: How many of the other rows stand where.
        modes: How many images are to be paid, by mode.
        prices: Dollars for an image, by mode.
        seconds: How long it takes at the account's limits, when the service is as fast as it
            says.
        spent: Dollars that the output has cost so far, or may have.
        budget: Dollars that the output may cost in all, if that is limited.
        digest: Names exactly what is to be paid, in this order and at these prices.
    """

    url: str
    rows: int = 0
    left_out: int = 0
    refused: int = 0
    problems: list[RefusedRow] = field(default_factory=list)
    equal: int = 0
    standings: Counter[PlannedAction] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    prices: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    spent: float = 0.0
    budget: float | None = None
    digest: str = ""

    @property
    def to_pay(self) -> int:
        """Images to be paid."""
        return self.standings[PlannedAction.PAY]

    @property
    def price(self) -> float:
        """Dollars for them, if each does at the first attempt."""
        return sum(self.prices[mode] * images for mode, images in self.modes.items())

    def check(self, *, skip_invalid: bool) -> None:
        """Refuse to go on while a row is invalid.

        Raises:
            ManifestError: Some are, and they are not to be skipped; or there is no other row.
        """
        if not self.refused or (skip_invalid and self.refused < self.rows):
            return
        told = "; ".join(f"line {row.line}: {row.reason}" for row in self.problems[:_TOLD])
        more = f"; and {self.refused - _TOLD:,} more" if self.refused > _TOLD else ""
        end = "Mend them, or skip them with --skip-invalid (in a flow, skip_invalid)."
        raise ManifestError(
            f"{self.refused:,} of {self.rows:,} rows of {self.url} are invalid, so nothing was "
            f"submitted: {told}{more}. {end if self.refused < self.rows else 'Mend them.'}"
        )

    def capped(self, options: RowOptions, unasked: float) -> RowOptions:
        """The options with a budget that keeps the run to this plan's price.

        Args:
            options: What a person has decided.
            unasked: Dollars that may be spent without asking anybody.
        """
        cap = self.spent + max(self.price, unasked)
        return replace(
            options,
            budget_usd=cap if options.budget_usd is None else min(cap, options.budget_usd),
        )

    def summary(self, output: str) -> BatchSummary:
        """The summary of a run that stops here."""
        told = {
            "stored": self.standings[PlannedAction.STORED],
            "failed": self.refused + self.standings[PlannedAction.LEFT],
            "unknown": self.standings[PlannedAction.UNKNOWN],
            "outstanding": self.standings[PlannedAction.OUTSTANDING_STATES],
        }
        left = self.rows - sum(told.values())
        already = told["stored"]
        return BatchSummary(
            output=output, rows=self.rows, already_stored=already, not_submitted=left, **told
        )

    def __str__(self) -> str:
        counts = [
            (self.refused, "invalid"),
            (self.equal, "equal to others, paid once"),
            *((self.standings[standing], str(standing)) for standing in PlannedAction),
        ]
        lines = [f"{self.rows:>9,}  rows in {self.url}"]
        if self.left_out:
            lines.append(f"{self.left_out:>9,}  other files left out, told by their names")
        lines += [
            f"{number:>9,}  {told}"
            for number, told in counts
            if number or told == PlannedAction.PAY
        ]
        modes = [
            f"{images:,} in {mode} at ${self.prices[mode]:g}"
            for mode, images in sorted(self.modes.items())
        ]
        lines.append(f"{f'${self.price:,.2f}':>9}  price{': ' if modes else ''}{', '.join(modes)}")
        if self.to_pay:
            lines.append(f"{_span(self.seconds):>9}  at the account's limits, or more")
        if self.spent:
            lines.append(f"{f'${self.spent:,.2f}':>9}  spent by earlier runs, or maybe spent")
        if self.budget is not None:
            short = self.spent + self.price > self.budget + 1e-9
            ends = ": it ends before the rows do" if short else ""
            lines.append(f"{f'${self.budget:,.2f}':>9}  budget for all runs{ends}")
        return "\n".join(lines)


async def make_plan(
    manifest: Manifest,
    store: RecordStore,
    options: RowOptions,
    *,
    prices: dict[str, float],
    requests_per_minute: int,
    concurrent_tasks: int,
    tell: Callable[[RefusedRow], None] | None = None,
) -> Plan:
    """Read the manifest and the ledger from end to end; asks the service nothing.

    Args:
        manifest: What is to be done.
        store: The ledger of the output.
        options: What a person has decided about the rows.
        prices: Dollars for an image, by mode.
        requests_per_minute: The account's limit.
        concurrent_tasks: The account's limit.
        tell: Called in another thread with each row that is refused.

    Raises:
        ManifestError: The manifest cannot be read to its end, or has no rows.
        LedgerError: The ledger cannot be read or is damaged.
    """
    with LedgerIndex() as standings:
        await standings.read(store, options)
        plan = Plan(
            url=manifest.url,
            prices=prices,
            spent=standings.dollars(),
            budget=options.budget_usd,
        )
        await asyncio.to_thread(_read, plan, manifest, standings, options.references, tell)
    looks = 1 + max(0.0, _GENERATION - options.cadence.initial_delay) / options.cadence.interval
    a_second = min(
        concurrent_tasks / _GENERATION, requests_per_minute / 60 / (1 + math.ceil(looks))
    )
    plan.seconds = plan.to_pay / a_second + _GENERATION if plan.to_pay else 0.0
    return plan


def _read(
    plan: Plan,
    manifest: Manifest,
    standings: LedgerIndex,
    references: References,
    tell: Callable[[RefusedRow], None] | None,
) -> None:
    digest = hashlib.sha256(repr(sorted(plan.prices.items())).encode())

    def is_to_be_paid(row: Row) -> bool:
        return _standing(standings, row) is PlannedAction.PAY

    with DuplicateIndex() as keys:
        for row in with_reference_checks(manifest.rows(), references, is_to_be_paid):
            plan.rows += 1
            if isinstance(row, RefusedRow):
                plan.refused += 1
                if len(plan.problems) < _KEPT:
                    plan.problems.append(row)
                if tell is not None:
                    tell(row)
                continue
            key = row.key
            if keys.first(key.encode(), plan.rows) != plan.rows:
                plan.equal += 1
                continue
            standing = _standing(standings, row)
            plan.standings[standing] += 1
            if standing is PlannedAction.PAY:
                plan.modes[row.request.mode] += 1
                digest.update(key.encode())
    if not plan.rows:
        raise ManifestError(f"The manifest {manifest.url} has no rows.")
    plan.left_out = manifest.left_out
    plan.digest = digest.hexdigest()


def _standing(standings: LedgerIndex, row: Row) -> PlannedAction:
    return standings.of(row.key, row.request.image_urls)


def _span(seconds: float) -> str:
    minutes = math.ceil(seconds / 60)
    if minutes < 2:  # noqa: PLR2004 - below two minutes, seconds are of interest
        return f"{math.ceil(seconds)} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"  # noqa: PLR2004
