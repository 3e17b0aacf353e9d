"""Helpers for batches on virtual time, and the check of their invariants and bill."""

from prefect_flux_kontext.batch.status import read_ledger_status
from prefect_flux_kontext.ledger.store import open_ledger_store
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from prefect_flux_kontext.storage.filesystem import OutputFolder
from tests.chaos.simulation import check_environment, simulate

LINES = [(f"r{n}", f"row number {n}") for n in range(10)]

QUICK = SandboxSettings(mean=0.5, long_edge=16)

SLOW = SandboxSettings(mean=60, long_edge=16)


def fault_on(kind, fault, *numbers):
    """Make a hook that fails the n-th requests of a kind, or all of them."""

    def hook(seen, _what, number):
        return fault if seen == kind and (not numbers or number in numbers) else None

    return hook


def run_simulation(main, *, hook=None, settings=QUICK):
    return simulate(main, 1, None, settings, hook=hook)


def open_store(env):
    return open_ledger_store(OutputFolder(env.url))


async def check_invariants(env, lines, **how):
    found = await check_environment(env, lines, **how)
    assert not found.problems, str(found)
    status = await read_ledger_status(open_store(env))
    bill = env.sandbox.service.bill()
    assert round(status.spent, 6) <= float(bill["dollars"]) + 1e-9
    assert float(bill["dollars"]) <= status.spent + status.doubtful + 1e-9
    return found
