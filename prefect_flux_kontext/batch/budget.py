"""A hard cap on what an output may cost, over all its runs."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from prefect_flux_kontext.batch.index import LedgerIndex
from prefect_flux_kontext.errors import BudgetReachedError, ConfigurationError
from prefect_flux_kontext.ledger.heartbeat import is_alive

if TYPE_CHECKING:
    from prefect_flux_kontext.batch.policy import RowOptions
    from prefect_flux_kontext.ledger.store import RecordStore


class Budget:
    """Dollars that may still be committed. Sums are whole millionths, so none is lost.

    Each POST's price is reserved before its intent is written, and given back only when the POST
    is known not to have been accepted. What may have been accepted stays counted.

    Args:
        dollars: The cap; None for none.
        committed: Dollars that were spent, or may have been, before.
    """

    def __init__(self, dollars: float | None, committed: float = 0.0) -> None:
        self._dollars = dollars
        self._left = None if dollars is None else _millionths(dollars) - _millionths(committed)
        self._in_flight = 0
        self._changed = asyncio.Condition()

    async def reserve(self, price: float) -> None:
        """Set the price of a POST aside, or wait while what is in flight may still be given back.

        Raises:
            BudgetReachedError: The cap would be passed.
        """
        if self._left is None:
            return
        needed = _millionths(price)
        async with self._changed:
            while needed > self._left:
                if not self._in_flight:
                    raise BudgetReachedError(
                        f"The budget of ${self._dollars:,.2f} for this output is reached: "
                        f"${self._left / 1_000_000:,.2f} are left, the next image costs "
                        f"${price:g}."
                    )
                await self._changed.wait()
            self._left -= needed
            self._in_flight += 1

    async def settle(self, price: float, *, given_back: bool) -> None:
        """Say what became of a POST: its price stays counted, or is known not to be owed."""
        if self._left is None:
            return
        async with self._changed:
            self._in_flight -= 1
            if given_back:
                self._left += _millionths(price)
            self._changed.notify_all()


async def open_budget(store: RecordStore, owner: str, options: RowOptions) -> Budget:
    """The budget of a run, less what all earlier ones have spent or may have.

    Two runs that pay into one output at once would each count without the other, so a run with
    a budget starts only where no other lives. Both say that they live before they look.

    Raises:
        ConfigurationError: Another run lives.
        LedgerError: The ledger cannot be read.
    """
    if options.share_usd is not None:
        return Budget(options.share_usd)
    if options.budget_usd is None:
        return Budget(None)
    await ensure_sole_run(store, owner)
    with LedgerIndex() as standings:
        await standings.read(store, options)
        return Budget(options.budget_usd, standings.dollars())


async def ensure_sole_run(store: RecordStore, owner: str) -> None:
    """Make sure that no other run pays into the output.

    Raises:
        ConfigurationError: One does.
        LedgerError: The ledger cannot be read.
    """
    for name in await store.names("owners"):
        other = name.removesuffix(".json")
        if other != owner and await is_alive(store, other):
            raise ConfigurationError(
                "Another run is paying into this output, so a budget cannot be kept: wait until "
                "it has ended (a run that died on another machine counts as living for a minute)."
            )


def _millionths(dollars: float) -> int:
    return round(dollars * 1_000_000)
