"""Hard caps on what an output, and groups of its rows, may cost over all its runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from prefect_flux_kontext.batch.index import LedgerIndex
from prefect_flux_kontext.errors import (
    BatchStoppedError,
    BudgetReachedError,
    ConfigurationError,
    GroupBudgetReachedError,
)
from prefect_flux_kontext.ledger.heartbeat import Heartbeat, wait_for_dead

if TYPE_CHECKING:
    from prefect_flux_kontext.batch.policy import RowOptions
    from prefect_flux_kontext.batch.spending import Spending
    from prefect_flux_kontext.ledger.store import RecordStore

logger = logging.getLogger(__name__)


@dataclass
class _Cap:
    """What may still be committed under one cap, in millionths of a dollar."""

    name: str
    dollars: float
    left: int
    in_flight: int = 0
    is_reported: bool = False


class Budget:
    """Dollars that may still be committed, counted in whole millionths to avoid rounding errors.

    Each POST's price is reserved before its intent is written, and returned only when the POST is
    known not to have been accepted. What may have been accepted stays counted. Prices are in
    dollars; `columns` are the values by which a row is counted.

    Args:
        dollars: The cap; None for no cap.
        committed: Dollars that earlier runs have spent, or may have spent.
        heartbeat: The heartbeat of this run, without which other runs would not wait for it.
        by: Caps by column and value, for the rows with that value.
        spending: What earlier runs have spent, or may have spent, by these columns.
    """

    def __init__(
        self,
        dollars: float | None,
        committed: float = 0.0,
        heartbeat: Heartbeat | None = None,
        by: Mapping[str, Mapping[str, float]] | None = None,
        spending: Spending | None = None,
    ) -> None:
        self._heartbeat = heartbeat
        self._whole = None if dollars is None else _make_cap("this output", dollars, committed)
        self._by = {
            (column, value): _make_cap(
                f"{column}={value}", cap, spending.sum_dollars(column, value) if spending else 0.0
            )
            for column, caps in (by or {}).items()
            for value, cap in caps.items()
        }
        self._changed = asyncio.Condition()

    def check(self, price: float, columns: Mapping[str, str]) -> None:
        """Check that a POST may still be possible, before anything is prepared for it.

        Raises:
            BudgetReachedError: As for `reserve`.
        """
        short = self._find_short(_millionths(price), self._find_caps(columns))
        if short is not None and not short.in_flight:
            self._raise_reached(short, price)

    async def reserve(self, price: float, columns: Mapping[str, str]) -> None:
        """Reserve the price of a POST; wait while POSTs in flight may still return theirs.

        Raises:
            BudgetReachedError: The cap would be exceeded.
            GroupBudgetReachedError: The cap of the row's group would be exceeded.
        """
        caps = self._find_caps(columns)
        if not caps:
            return
        needed = _millionths(price)
        async with self._changed:
            while short := self._find_short(needed, caps):
                if not short.in_flight:
                    self._raise_reached(short, price)
                await self._changed.wait()
            for cap in caps:
                cap.left -= needed
                cap.in_flight += 1

    def check_current(self) -> None:
        """Check that no other run can have paid without this budget's knowledge.

        Call this after the intent is written: a later run counts it.

        Raises:
            BatchStoppedError: This run was frozen for so long that it counted as dead.
        """
        if (self._whole or self._by) and self._heartbeat and self._heartbeat.is_overdue:
            raise BatchStoppedError(
                "This run was frozen, so another run may have spent from its budget. Run it again."
            )

    async def settle(self, price: float, columns: Mapping[str, str], *, refunded: bool) -> None:
        """Settle a reservation: refunded if the POST is known not to have been accepted."""
        caps = self._find_caps(columns)
        if not caps:
            return
        async with self._changed:
            for cap in caps:
                cap.in_flight -= 1
                if refunded:
                    cap.left += _millionths(price)
            self._changed.notify_all()

    def _find_caps(self, columns: Mapping[str, str]) -> list[_Cap]:
        caps = [self._by[item] for item in columns.items() if item in self._by]
        return [self._whole, *caps] if self._whole else caps

    def _find_short(self, needed: int, caps: Sequence[_Cap]) -> _Cap | None:
        return next((cap for cap in caps if needed > cap.left), None)

    def _raise_reached(self, cap: _Cap, price: float) -> NoReturn:
        message = (
            f"The budget of ${cap.dollars:,.2f} for {cap.name} is reached: "
            f"${cap.left / 1_000_000:,.2f} is left, the next image costs ${price:g}."
        )
        if cap is self._whole:
            raise BudgetReachedError(message)
        if not cap.is_reported:
            cap.is_reported = True
            logger.warning("%s Its other rows are not submitted.", message)
        raise GroupBudgetReachedError(message)


def _make_cap(name: str, dollars: float, committed: float) -> _Cap:
    return _Cap(name, dollars, _millionths(dollars) - _millionths(committed))


async def open_budget(store: RecordStore, heartbeat: Heartbeat, options: RowOptions) -> Budget:
    """Open the budget of a run, less what earlier runs have spent or may have spent.

    Two runs that pay into one output at the same time would not see each other's payments, so a
    run with a budget starts only while no other run is alive. Each run registers its heartbeat
    before it checks for others.

    Raises:
        ConfigurationError: Another run is paying into the output.
        LedgerError: The ledger cannot be read.
    """
    if not options.has_budget:
        return Budget(None)
    if options.is_share:
        return Budget(options.budget_usd, heartbeat=heartbeat, by=options.budget_by)
    await ensure_sole_run(store, heartbeat.owner, "a budget cannot be kept")
    with LedgerIndex() as index:
        await index.read(store)
        spending = index.sum_by(options.budget_by)
        return Budget(
            options.budget_usd, sum(index.sum_money()), heartbeat, options.budget_by, spending
        )


async def ensure_sole_run(store: RecordStore, owner: str, consequence: str) -> None:
    """Check that no other run is paying into the output.

    Whether a run on another machine has died is known after a minute; this waits for it.

    Args:
        store: The ledger's records.
        owner: The name of this run.
        consequence: What cannot be done while another run is alive, for the message.

    Raises:
        ConfigurationError: Another run is alive.
        LedgerError: The ledger cannot be read.
    """
    for name in await store.list_names("owners"):
        other = name.removesuffix(".json")
        if other != owner and not await wait_for_dead(store, other):
            raise ConfigurationError(
                f"Another run is paying into this output, so {consequence}. Wait until it has "
                "ended."
            )


def _millionths(dollars: float) -> int:
    return round(dollars * 1_000_000)
