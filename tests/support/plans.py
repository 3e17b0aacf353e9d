"""Plans of a manifest, by default for an output without payments."""

import asyncio
import itertools

from prefect_flux_kontext.batch.planning import make_plan
from prefect_flux_kontext.batch.policy import RowOptions
from prefect_flux_kontext.client.polling import PollingCadence
from prefect_flux_kontext.ledger.store import RecordStore

PRICES = {"pro": 0.03, "max": 0.06}
_numbers = itertools.count()


def build_plan(manifest, store=None, *, limit=None, prices=PRICES, **options):
    """Make the plan with the limits of a full account."""
    return asyncio.run(
        make_plan(
            manifest,
            store or RecordStore(f"memory://nothing-paid-{next(_numbers)}"),
            RowOptions(cadence=PollingCadence(), **options),
            prices=prices,
            requests_per_minute=10_000,
            concurrent_tasks=1_000,
            limit=limit,
        )
    )
