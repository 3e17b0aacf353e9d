"""The plan of a batch: what a run would do about each row, and what it would pay."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import math
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from prefect_flux_kontext.batch.index import LedgerIndex, PlannedAction
from prefect_flux_kontext.batch.pilot import PilotSample
from prefect_flux_kontext.batch.progress import format_duration
from prefect_flux_kontext.batch.reference_checks import with_reference_checks
from prefect_flux_kontext.batch.spending import STANDARD_COLUMNS, Spending, label_row
from prefect_flux_kontext.batch.summary import BatchSummary
from prefect_flux_kontext.errors import ManifestError
from prefect_flux_kontext.manifest.row import RefusedRow, Row
from prefect_flux_kontext.references.location import has_other_format, is_share_page
from prefect_flux_kontext.settings import find_price
from prefect_flux_kontext.storage.temp_db import DuplicateIndex

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from prefect_flux_kontext.batch.policy import RowOptions
    from prefect_flux_kontext.client.polling import PollingCadence
    from prefect_flux_kontext.ledger.store import RecordStore
    from prefect_flux_kontext.manifest.reader import Manifest

_MAX_PROBLEMS = 1_000
"""Refused rows that a plan keeps, so that its size does not grow with the manifest."""

_MAX_SHOWN_PROBLEMS = 20
"""Different problems that an error message names."""

_MAX_SHOWN_LINES = 8
_MAX_HOSTS = 10
"""Hosts whose references' folders a plan keeps."""

_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")

_GENERATION_SECONDS = 30.0
"""How long the service takes for an image, by its own reference page."""


@dataclass(kw_only=True)
class Plan:
    """What a run would do.

    Attributes:
        url: The manifest.
        rows: All rows, including refused ones.
        lines: Lines of the manifest that were read, with the header.
        with_reference: Valid rows with a reference.
        reference_folders: By host or bucket, the folder that holds its references.
        share_pages: References that are pages of Google Drive, Dropbox and the like.
        other_formats: References that are named as files of formats not taken.
        skipped: Files of a folder that are no rows, by reason.
        refused: Invalid rows.
        problems: The first thousand refused rows.
        duplicates: Rows that ask for the same as another row, and are paid only once.
        run_rows: Rows of the run: all, or those up to the last one within the limit.
        actions: Number of the other rows by planned action.
        routes: Number of images to be paid, by mode and provider.
        prices: Dollars an image, by mode; see `find_price`.
        seconds: Estimated duration at the account's limits, if the service is as fast as
            documented.
        spent: Dollars that the output has cost so far, or may have cost.
        budget: Dollars that the output may cost in all; None for no cap.
        balance: Dollars of the account; None if that is not known.
        budget_by: Dollars that the rows with a value in a column may cost in all.
        spending: Dollars that the output has cost so far, or may have cost, by these columns.
        planned: Dollars for the images to be paid, by the same columns.
        digest: Identifies exactly what is to be paid, in this order and at these prices.
        pilot: The output names of the rows of a pilot; empty without one, or if it would have
            all rows to be paid.
    """

    url: str
    rows: int = 0
    lines: int = 0
    with_reference: int = 0
    reference_folders: dict[str, str] = field(default_factory=dict)
    share_pages: int = 0
    other_formats: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    problems: list[RefusedRow] = field(default_factory=list)
    duplicates: int = 0
    run_rows: int = 0
    actions: Counter[PlannedAction] = field(default_factory=Counter)
    routes: Counter[tuple[str, str]] = field(default_factory=Counter)
    prices: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    spent: float = 0.0
    budget: float | None = None
    balance: float | None = None
    budget_by: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    spending: Spending = field(default_factory=Spending)
    planned: Spending = field(default_factory=Spending)
    digest: str = ""
    pilot: frozenset[str] = frozenset()

    @property
    def skipped_files(self) -> int:
        """Number of files of a folder that are no rows."""
        return self.skipped.total()

    @property
    def to_pay(self) -> int:
        """Number of images to be paid."""
        return self.actions[PlannedAction.PAY]

    @property
    def new_rows(self) -> int:
        """Number of rows of the run that are not stored already."""
        return self.run_rows - self.actions[PlannedAction.STORED]

    @property
    def price(self) -> float:
        """Dollars for all images to be paid, if each succeeds at the first attempt."""
        return sum(
            find_price(self.prices, *route) * images for route, images in self.routes.items()
        )

    def check(self, *, skip_invalid: bool) -> None:
        """Check that no row is invalid.

        Args:
            skip_invalid: Whether invalid rows are allowed, as long as there are valid ones.

        Raises:
            ManifestError: Rows are invalid and are not to be skipped, or all rows are invalid.
        """
        if not self.refused or (skip_invalid and self.refused < self.rows):
            return
        groups = self.describe_problems()
        shown = "\n".join(groups[:_MAX_SHOWN_PROBLEMS])
        if len(groups) > _MAX_SHOWN_PROBLEMS:
            shown += f"\n  … and {len(groups) - _MAX_SHOWN_PROBLEMS:,} more problems"
        verb = "is" if self.refused == 1 else "are"
        advice = "Fix them, or skip them with --skip-invalid (in a flow, skip_invalid)."
        raise ManifestError(
            f"{self.refused:,} of {self.rows:,} rows of {self.url} {verb} invalid, so nothing was "
            f"submitted:\n{shown}\n{advice if self.refused < self.rows else 'Fix them.'}"
        )

    def describe_problems(self) -> list[str]:
        """Return one line for each kind of problem, with the rows that have it."""
        kinds: dict[str, list[RefusedRow]] = {}
        for row in self.problems:
            kinds.setdefault(_QUOTED.sub("'…'", row.reason), []).append(row)
        lines = [
            f"  line {rows[0].line}, {rows[0].id!r:.80}: {rows[0].reason}"
            if len(rows) == 1
            else f"  {len(rows):,} rows ({_format_lines(rows)})"
            f"{', such as' if len({row.reason for row in rows}) > 1 else ''}: {rows[0].reason}"
            for rows in kinds.values()
        ]
        if self.refused > len(self.problems):
            lines.append(f"  … and {self.refused - len(self.problems):,} more rows")
        return lines

    def with_budget_cap(self, options: RowOptions, unasked: float) -> RowOptions:
        """Return the options with a budget that limits the run to this plan's price.

        Args:
            options: The user's options.
            unasked: Dollars that may be spent without asking anybody.
        """
        cap = self.spent + max(self.price, unasked)
        return replace(
            options,
            budget_usd=cap if options.budget_usd is None else min(cap, options.budget_usd),
        )

    def list_budgets(self) -> Iterator[tuple[str, str, float, float, float]]:
        """Yield column, value, budget, dollars spent and dollars to be paid of each group."""
        for column, caps in self.budget_by.items():
            for value, dollars in caps.items():
                spent, price = (
                    each.sum_dollars(column, value) for each in (self.spending, self.planned)
                )
                yield column, value, dollars, spent, price

    def to_summary(self, output: str) -> BatchSummary:
        """Return the summary of a run that stops after planning."""
        counts = {
            "stored": self.actions[PlannedAction.STORED],
            "failed": self.refused + self.actions[PlannedAction.FAILED],
            "unknown": self.actions[PlannedAction.UNKNOWN],
            "outstanding": self.actions[PlannedAction.OUTSTANDING],
        }
        return BatchSummary(
            output=output,
            rows=self.rows,
            already_stored=counts["stored"],
            not_submitted=self.rows - sum(counts.values()),
            **counts,
        )

    def __str__(self) -> str:
        counts = [
            (self.refused, "invalid"),
            (self.duplicates, "equal to others, paid once"),
            *((self.actions[action], str(action)) for action in PlannedAction),
            (len(self.pilot), "in the pilot, which runs first"),
            (self.rows - self.run_rows, "after the last row within the limit, not run"),
        ]
        lines = [f"{self.rows:>9,}  rows in {self.url}"]
        without = self.rows - self.refused - self.with_reference
        pages = "references to share pages, which are seldom images"
        counts = [
            (self.lines if self.lines != self.rows else 0, "lines read"),
            (self.with_reference, "with a reference"),
            (without, "without a reference, as text to image"),
            *((number, f"{reason} skipped") for reason, number in sorted(self.skipped.items())),
            (self.share_pages, pages),
            (self.other_formats, "references named as no JPG, PNG or WebP file"),
            *counts,
        ]
        lines += [
            f"{number:>9,}  {label}"
            for number, label in counts
            if number or label == PlannedAction.PAY
        ]
        routes = [
            f"{images:,} in {mode}{'' if provider == 'auto' else f' ({provider})'} at "
            f"${find_price(self.prices, mode, provider):g}"
            for (mode, provider), images in sorted(self.routes.items())
        ]
        prices = f"price: {', '.join(routes)}" if routes else "price"
        lines.append(f"{f'${self.price:,.2f}':>9}  {prices}")
        unknown = {
            f"FLUX_KONTEXT_PRICE_{mode.upper()}_OFFICIAL"
            for mode, provider in self.routes
            if provider != "value" and f"{mode} official" not in self.prices
        }
        if unknown:
            names = " and ".join(sorted(unknown))
            lines.append(f"{'':>9}  more if `auto` takes the official route; its price: {names}")
        if self.to_pay:
            basis = f"at the account's limits, if an image takes {_GENERATION_SECONDS:g} s"
            lines.append(f"{format_duration(self.seconds):>9}  {basis}")
        if self.spent:
            lines.append(f"{f'${self.spent:,.2f}':>9}  spent or possibly spent by earlier runs")
        if self.budget is not None:
            exceeded = self.spent + self.price > self.budget + 1e-9
            warning = ": not enough for all rows" if exceeded else ""
            lines.append(f"{f'${self.budget:,.2f}':>9}  budget for all runs{warning}")
        for column, value, dollars, spent, price in self.list_budgets():
            exceeded = spent + price > dollars + 1e-9
            warning = ", not enough for all its rows" if exceeded else ""
            lines.append(
                f"{f'${dollars:,.2f}':>9}  budget for {column}={value}: ${spent:,.2f} spent, "
                f"${price:,.2f} to be paid{warning}"
            )
        if self.balance is not None:
            warning = ": not enough for all rows" if self.balance < self.price - 1e-9 else ""
            lines.append(f"{f'${self.balance:,.2f}':>9}  balance of the account{warning}")
        return "\n".join(lines)


async def make_plan(
    manifest: Manifest,
    store: RecordStore,
    options: RowOptions,
    *,
    prices: dict[str, float],
    requests_per_minute: int,
    concurrent_tasks: int,
    limit: int | None = None,
    pilot: int | None = None,
) -> Plan:
    """Read the manifest and the ledger from end to end, without a request to the service.

    Args:
        manifest: The rows to plan.
        store: The ledger of the output.
        options: The user's options for the rows.
        prices: Dollars an image, by mode; see `find_price`.
        requests_per_minute: The account's limit.
        concurrent_tasks: The account's limit.
        limit: Rows to pay for at most, the first ones; None for all.
        pilot: Rows of the sample to run first; None for no pilot.

    Raises:
        ManifestError: The manifest cannot be read to its end, or has no rows.
        LedgerError: The ledger cannot be read or is damaged.
    """
    with LedgerIndex() as index:
        await index.read(store)
        plan = Plan(
            url=manifest.url,
            prices=prices,
            spent=sum(index.sum_money()),
            budget=options.budget_usd,
            budget_by=options.budget_by,
            spending=index.sum_by(options.money_columns),
            planned=Spending(options.money_columns),
        )
        sample = PilotSample(pilot or 0)
        await asyncio.to_thread(_plan_rows, plan, manifest, index, options, limit, sample)
        if pilot and plan.to_pay > pilot:
            plan.pilot = sample.names()
    plan.seconds = _estimate_seconds(
        plan.to_pay, options.cadence, requests_per_minute, concurrent_tasks
    )
    return plan


def _estimate_seconds(
    images: int, cadence: PollingCadence, requests_per_minute: int, concurrent_tasks: int
) -> float:
    if not images:
        return 0.0
    polls = 1 + max(0.0, _GENERATION_SECONDS - cadence.initial_delay) / cadence.interval
    images_per_second = min(
        concurrent_tasks / _GENERATION_SECONDS, requests_per_minute / 60 / (1 + math.ceil(polls))
    )
    return images / images_per_second + _GENERATION_SECONDS


def _plan_rows(
    plan: Plan,
    manifest: Manifest,
    index: LedgerIndex,
    options: RowOptions,
    limit: int | None,
    sample: PilotSample,
) -> None:
    digest = hashlib.sha256(repr(sorted(plan.prices.items())).encode())

    def is_to_be_paid(row: Row) -> bool:
        return not plan.run_rows and index.get_actions([row], options) == [PlannedAction.PAY]

    unseen = set(plan.planned.names) - STANDARD_COLUMNS
    with DuplicateIndex() as keys:
        for row, is_first, action in _decide(
            with_reference_checks(manifest.rows(), options.references, is_to_be_paid),
            keys,
            index,
            options,
        ):
            plan.rows += 1
            unseen.difference_update(row.cells if unseen else ())
            if isinstance(row, RefusedRow):
                plan.refused += 1
                if len(plan.problems) < _MAX_PROBLEMS:
                    plan.problems.append(row)
                continue
            _count_references(plan, row.image_urls)
            if plan.run_rows:
                continue  # after the limit, rows are only checked
            if not is_first:
                plan.duplicates += 1
                continue
            plan.actions[action] += 1
            if action is PlannedAction.PAY:
                _count_price(plan, row)
                digest.update(row.key.encode())
                sample.add(row)
                if plan.to_pay == limit:
                    plan.run_rows = plan.rows
    plan.run_rows = plan.run_rows or plan.rows
    if not plan.rows:
        raise ManifestError(f"The manifest {manifest.url} has no rows.")
    _check_columns_seen(plan, unseen)
    plan.lines = manifest.counts["lines"]
    plan.skipped = manifest.skipped
    plan.digest = digest.hexdigest()


def _decide(
    blocks: Iterable[list[Row | RefusedRow]],
    keys: DuplicateIndex,
    index: LedgerIndex,
    options: RowOptions,
) -> Iterator[tuple[Row | RefusedRow, bool, PlannedAction]]:
    """Yield each row, whether it is the first of its key, and its action if it is valid."""
    number = 0
    for block in blocks:
        valid = [row for row in block if isinstance(row, Row)]
        numbers = range(number, number + len(valid))
        number += len(valid)
        firsts = keys.add_all((row.key for row in valid), numbers)
        actions = zip(index.get_actions(valid, options), firsts, numbers, strict=True)
        for row in block:
            if isinstance(row, Row):
                action, first, own = next(actions)
                yield row, first == own, action
            else:
                yield row, True, PlannedAction.FAILED


def _check_columns_seen(plan: Plan, unseen: set[str]) -> None:
    if unseen and plan.refused < plan.rows:
        raise ManifestError(
            f"No row of {plan.url} has a column {', '.join(sorted(unseen))}, by which money is to "
            "be counted. Check --by and --budget-by (in a flow, spend_by and budget_by)."
        )


def _count_price(plan: Plan, row: Row) -> None:
    plan.routes[row.route] += 1
    if names := plan.planned.names:
        plan.planned.add(label_row(row, names), find_price(plan.prices, *row.route))


def _count_references(plan: Plan, references: list[str]) -> None:
    if references:  # the service takes one
        plan.with_reference += 1
        plan.share_pages += is_share_page(references[0])
        plan.other_formats += has_other_format(references[0])
        _add_reference_folders(plan.reference_folders, references)


def _add_reference_folders(folders: dict[str, str], references: Iterable[str]) -> None:
    """Widen the folder of each reference's host, so that it holds the reference too."""
    for reference in references:
        folder = reference.partition("?")[0].rpartition("/")[0]
        host = "/".join(folder.split("/", 3)[:3])
        known = folders.get(host)
        if known is not None and f"{folder}/".startswith(f"{known}/"):
            continue
        parts = folder.split("/")
        if known is None:
            if len(folders) < _MAX_HOSTS:
                folders[host] = folder
        else:
            both = itertools.takewhile(
                lambda pair: pair[0] == pair[1], zip(known.split("/"), parts, strict=False)
            )
            folders[host] = "/".join(part for part, _ in both)


def _format_lines(rows: Sequence[RefusedRow]) -> str:
    """Return the line numbers of rows, such as `lines 2-9, 12, …`."""
    ranges: list[list[int]] = []
    for row in rows:
        if ranges and row.line <= ranges[-1][-1] + 1:
            ranges[-1][1:] = [row.line]
        else:
            ranges.append([row.line])
    shown = ", ".join(
        "-".join(map(str, dict.fromkeys(ends))) for ends in ranges[:_MAX_SHOWN_LINES]
    )
    more = ", …" if len(ranges) > _MAX_SHOWN_LINES else ""
    return f"line{'s' if '-' in shown or ',' in shown else ''} {shown}{more}"
