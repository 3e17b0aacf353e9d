"""A hard cap on what an output may cost, over all its runs."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from prefect_flux_kontext.batch.index import LedgerIndex
from prefect_flux_kontext.errors import (
    BatchStoppedError,
    BudgetReachedError,
    ConfigurationError,
)
from prefect_flux_kontext.ledger.heartbeat import wait_for_dead

if TYPE_CHECKING:
    from prefect_flux_kontext.batch.policy import RowOptions
    from prefect_flux_kontext.ledger.heartbeat import Heartbeat
    from prefect_flux_kontext.ledger.store import RecordStore


class Budget:
    """Dollars that may still be committed, counted in whole millionths to avoid rounding errors.

    Each POST's price is reserved before its intent is written, and returned only when the POST is
    known not to have been accepted. What may have been accepted stays counted.

    Args:
        dollars: The cap; None for no cap.
        committed: Dollars that earlier runs have spent, or may have spent.
        heartbeat: The heartbeat of this run, without which other runs would not wait for it.
    """

    def __init__(
        self,
        dollars: float | None,
        committed: float = 0.0,
        heartbeat: Heartbeat | None = None,
    ) -> None:
        self._dollars = dollars
        self._heartbeat = heartbeat
        self._left = None if dollars is None else _millionths(dollars) - _millionths(committed)
        self._in_flight = 0
        self._changed = asyncio.Condition()

    async def reserve(self, price: float) -> None:
        """Reserve the price of a POST; wait while POSTs in flight may still return theirs.

        Raises:
            BudgetReachedError: The cap would be exceeded.
        """
        if self._left is None:
            return
        needed = _millionths(price)
        async with self._changed:
            while needed > self._left:
                if not self._in_flight:
                    raise BudgetReachedError(
                        f"The budget of ${self._dollars:,.2f} for this output is reached: "
                        f"${self._left / 1_000_000:,.2f} is left, the next image costs "
                        f"${price:g}."
                    )
                await self._changed.wait()
            self._left -= needed
            self._in_flight += 1

    def check_current(self) -> None:
        """Check that no other run can have paid without this budget's knowledge.

        Call this after the intent is written: a later run counts it.

        Raises:
            BatchStoppedError: This run was frozen for so long that it counted as dead.
        """
        if self._dollars is not None and self._heartbeat and self._heartbeat.is_overdue:
            raise BatchStoppedError(
                "This run was frozen, so another run may have spent from its budget. Run it again."
            )

    async def settle(self, price: float, *, refunded: bool) -> None:
        """Settle a reservation when the outcome of its POST is known.

        Args:
            price: The reserved price, in dollars.
            refunded: Whether the POST is known not to have been accepted; else it stays counted.
        """
        if self._left is None:
            return
        async with self._changed:
            self._in_flight -= 1
            if refunded:
                self._left += _millionths(price)
            self._changed.notify_all()


async def open_budget(store: RecordStore, heartbeat: Heartbeat, options: RowOptions) -> Budget:
    """Open the budget of a run, less what earlier runs have spent or may have spent.

    Two runs that pay into one output at the same time would not see each other's payments, so a
    run with a budget starts only while no other run is alive. Each run registers its heartbeat
    before it checks for others.

    Raises:
        ConfigurationError: Another run is paying into the output.
        LedgerError: The ledger cannot be read.
    """
    if options.share_usd is not None:
        return Budget(options.share_usd, heartbeat=heartbeat)
    if options.budget_usd is None:
        return Budget(None)
    await ensure_sole_run(store, heartbeat.owner)
    with LedgerIndex() as index:
        await index.read(store)
        return Budget(options.budget_usd, index.sum_dollars(), heartbeat)


async def ensure_sole_run(store: RecordStore, owner: str) -> None:
    """Check that no other run is paying into the output.

    Whether a run on another machine has died is known after a minute; this waits for it.

    Raises:
        ConfigurationError: Another run is alive.
        LedgerError: The ledger cannot be read.
    """
    for name in await store.list_names("owners"):
        other = name.removesuffix(".json")
        if other != owner and not await wait_for_dead(store, other):
            raise ConfigurationError(
                "Another run is paying into this output, so a budget cannot be kept. Wait until "
                "it has ended."
            )


def _millionths(dollars: float) -> int:
    return round(dollars * 1_000_000)
