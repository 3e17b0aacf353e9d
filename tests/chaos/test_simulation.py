"""Seeded simulations on virtual time, single faults at every call, and tests of the checker."""

import asyncio

import pytest

from prefect_flux_kontext import errors
from prefect_flux_kontext.batch import stopping, waves
from prefect_flux_kontext.errors import LedgerError
from prefect_flux_kontext.ledger import ledger as ledger_module
from prefect_flux_kontext.ledger.ledger import Ledger
from prefect_flux_kontext.ledger.store import RecordStore
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from tests.chaos.random_batch import run_random_batch
from tests.chaos.simulation import check_environment, in_process, manifest, simulate

SEEDS = 40
LINES = [("a", "one"), ("b", "two"), ("c", "three"), ("d", "two")]
QUICK = SandboxSettings(mean=0.5, long_edge=16)


@pytest.mark.parametrize("first", range(0, SEEDS, 10))
def test_no_seed_violates_an_invariant(first):
    for seed in range(first, first + 10):
        found, _, _ = run_random_batch(seed)
        assert not found.problems, f"seed {seed}: {found}"


def test_same_seed_makes_the_same_decisions():
    assert run_random_batch(7) == run_random_batch(7)


def sweep(kind, fault, number, *, last=None):
    """Run a batch whose n-th call of a kind fails, and rerun it."""

    def hook(seen, _what, count):
        hit = count == number if last is None else number <= count <= last
        return fault if seen == kind and hit else None

    reached = []

    async def main(env):
        await in_process(env, None, manifest(LINES))
        reached.append(env.numbers[kind] >= number)
        env.hook = None
        found = await check_environment(env, LINES, complete=False)
        assert not found.problems, (kind, fault, number, str(found))
        await in_process(env, None, manifest(LINES))
        return await check_environment(env, LINES)

    found = simulate(main, number, None, QUICK, hook=hook)
    assert not found.problems, (kind, fault, number, str(found))
    return reached[0], found


@pytest.mark.parametrize(
    ("kind", "fault", "may_be_held"),
    [
        ("submit", "lost_reply", True),
        ("submit", "trouble_after", True),
        ("submit", "trouble_before", True),
        ("submit", "unconnected", False),
        ("submit", "limited", False),
        ("submit", "limited_in_200", False),
        ("submit", "unauthorized", False),
        ("submit", "no_balance", False),
        ("status", "status_trouble", False),
        ("download", "download_trouble", False),
        ("disk", "refused", False),
        ("disk", "written_but_unanswered", False),
    ],
)
def test_any_failing_call_pays_no_row_twice_or_loses_it(kind, fault, may_be_held):
    number, reached, held = 1, True, 0
    while reached:
        reached, found = sweep(kind, fault, number)
        held += found.unknown
        number += 1
    assert number > 4
    assert (held > 0) == may_be_held


@pytest.mark.parametrize("fault", ["refused", "written_but_unanswered"])
def test_ledger_outage_costs_nothing(fault):
    for number in range(1, 70, 6):
        sweep("disk", fault, number, last=number + 12)


# Without each safeguard, the checker must find a problem.


def find_problem(seeds=range(25)):
    """Return the first problem that one of the seeds finds, or None."""
    for seed in seeds:
        try:
            found, _, _ = run_random_batch(seed)
        except Exception as error:  # noqa: BLE001 - an unexpected error is a finding too
            return f"{type(error).__name__}: {error}"
        if found.problems:
            return str(found)
    return None


def test_checker_finds_a_missing_intent(monkeypatch):
    create, accepted = Ledger._create, Ledger.record_accepted

    async def but_the_intent(self, entry, step, record):
        return step == "intent" or await create(self, entry, step, record)

    async def written_after(self, entry, task_id, *, by=None):
        await create(self, entry, "intent", entry.intent)
        return await accepted(self, entry, task_id, by=by)

    monkeypatch.setattr(Ledger, "_create", but_the_intent)
    monkeypatch.setattr(Ledger, "record_accepted", written_after)
    assert "paid" in (find_problem() or "")


def test_checker_finds_missing_exclusive_creation(monkeypatch):
    async def overwrite(self, name, data):
        await self.replace(name, data)
        return True

    monkeypatch.setattr(RecordStore, "create", overwrite)
    assert find_problem()


def test_checker_finds_an_outage_read_as_absence(monkeypatch):
    """Exclusive creation prevents a second payment even then, but a paid image is lost.

    A collecting run takes the row for an unpaid one, and removes it from its open wave.
    """
    read = RecordStore.read
    outage = []

    def during_an_outage(answer):
        async def read_or_not(self, name):
            return answer(name) if outage and name.startswith("rows/") else await read(self, name)

        return read_or_not

    def raises(name):
        raise LedgerError(f"{name} could not be reached")

    async def main(env):
        await in_process(env, 2, manifest(LINES))
        assert env.posts
        outage.append(True)
        await in_process(env, None, [], only_collect=True)
        outage.clear()
        return await check_environment(env, LINES, complete=False)

    slow = SandboxSettings(mean=60, long_edge=16)
    monkeypatch.setattr(RecordStore, "read", during_an_outage(raises))
    assert not simulate(main, 3, None, slow).problems
    monkeypatch.setattr(RecordStore, "read", during_an_outage(lambda _name: None))
    assert "no unfinished wave names it" in str(simulate(main, 3, None, slow))


def test_checker_finds_resubmits_while_the_owner_is_alive(monkeypatch):
    async def dead(_store, _owner):
        return False

    async def main(env):
        runs = [in_process(env, None, manifest(LINES), resubmit=True) for _ in range(4)]
        await asyncio.gather(*runs)
        return len(list(env.sandbox.service.records()))

    def hook(kind, _request, _number):
        return "slow" if kind == "submit" else None

    def count(seed):
        return simulate(main, seed, None, QUICK, hook=hook)

    assert {count(seed) for seed in range(3)} == {3}
    monkeypatch.setattr(ledger_module, "is_alive", dead)
    assert any(count(seed) > 3 for seed in range(200))


@pytest.mark.parametrize("error", ["ReplyLostError", "ServiceTroubleError"])
def test_checker_finds_a_lost_reply_taken_for_a_refusal(monkeypatch, error):
    monkeypatch.setattr(getattr(errors, error), "not_accepted", True)
    assert "does not know" in (find_problem() or "")


def test_without_stop_check_a_stopped_batch_keeps_paying(monkeypatch):
    def count(main):
        return [simulate(main, seed, None, QUICK) for seed in range(3)]

    async def main(env):
        lines = [(f"r{n}", f"row {n}") for n in range(40)]

        def hook(kind, _request, number):
            return "no_balance" if kind == "submit" and number == 5 else None

        env.hook = hook
        await in_process(env, None, manifest(lines))
        return env.posts

    gated = count(main)
    monkeypatch.setattr(stopping.StopGate, "check", lambda _self: None)
    monkeypatch.setattr(stopping.StopGate, "stop", lambda _self, _reason: None)
    assert max(gated) < 5 + 3
    assert min(count(main)) > max(gated)


def test_checker_finds_paid_rows_in_no_open_wave(monkeypatch):
    async def unnamed(_store, _wave):
        return

    monkeypatch.setattr(waves, "open_wave", unnamed)
    assert "no unfinished wave names it" in (find_problem() or "")
