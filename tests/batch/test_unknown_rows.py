"""Rows that may or may not have been billed are held, named and settled."""

import asyncio

import pytest

from prefect_flux_kontext.batch.status import read_ledger_status
from prefect_flux_kontext.errors import (
    FluxKontextError,
    LedgerError,
)
from prefect_flux_kontext.ledger.ledger import Ledger
from prefect_flux_kontext.ledger.records import State
from prefect_flux_kontext.ledger.store import RecordStore
from tests.batch.simulated import LINES, check_invariants, fault_on, open_store, run_simulation
from tests.chaos.environment import SimulatedTransport, current_process
from tests.chaos.simulation import check_environment, in_process, manifest


def test_equal_row_after_a_lost_reply_is_unknown():
    """The intent is this run's own: waiting for its own end would be endless."""
    lines = [("a", "same"), ("b", "same"), *LINES]

    async def main(env):
        summary = await in_process(env, 100, manifest(lines))
        assert (summary.unknown, summary.stored) == (2, 10)
        await check_invariants(env, lines)

    def hook(kind, request, _number):
        return "lost_reply" if kind == "submit" and b'"same"' in request.content else None

    run_simulation(main, hook=hook)


def test_resubmit_unknown_spares_rows_of_the_same_run():
    lines = [("a", "same"), ("b", "same")]

    async def main(env):
        await in_process(env, None, manifest(lines), resubmit=True)
        assert env.posts == 1

    run_simulation(main, hook=fault_on("submit", "lost_reply", 1))


def test_two_runs_with_lost_replies_do_not_deadlock():
    unlucky = set()

    def hook(kind, _request, _number):
        process = current_process.get()
        if kind != "submit" or process.number in unlucky:
            return None
        unlucky.add(process.number)
        return "lost_reply"

    async def main(env):
        both = [in_process(env, 5_000, manifest(order)) for order in (LINES, LINES[::-1])]
        summaries = await asyncio.gather(*both)
        assert all(summary is not None for summary in summaries)
        assert [summary.unknown for summary in summaries] == [2, 2]
        found = await check_invariants(env, LINES)
        assert found.unknown == 2

    run_simulation(main, hook=hook)


def test_unknown_rows_are_held_until_resubmitted():
    async def main(env):
        await in_process(env, None, manifest(LINES))
        for _ in range(2):
            summary = await in_process(env, None, manifest(LINES))
            assert (summary.unknown, env.posts) == (2, 10)
        summary = await in_process(env, None, manifest(LINES), resubmit=True)
        assert (summary.stored, env.posts) == (10, 12)
        found = await check_environment(env, LINES)
        assert not found.problems, str(found)

    run_simulation(main, hook=fault_on("submit", "lost_reply", 3, 7))


@pytest.mark.parametrize("accepted", [True, False])
def test_user_settles_an_unknown_row(accepted):
    fault = "lost_reply" if accepted else "trouble_before"

    async def main(env):
        await in_process(env, None, manifest(LINES))
        status = await read_ledger_status(open_store(env))
        assert [status.states[State.UNKNOWN], len(status.unknown)] == [1, 1]
        assert status.doubtful == pytest.approx(0.03)
        [entry] = status.unknown
        ledger = Ledger(open_store(env), "person", {})
        if accepted:
            prompt = entry.intent.request.prompt
            records = env.sandbox.service.records()
            [task] = [r["taskId"] for r in records if r["prompt"] == prompt]
            await ledger.record_accepted(entry, task)
            summary = await in_process(env, None, [], only_collect=True)
            assert (summary.rows, summary.stored) == (1, 1)
        else:
            await ledger.record_rejected(entry, FluxKontextError("no", code="resolved"))
            summary = await in_process(env, None, manifest(LINES))
            assert summary.stored == 10
        assert len(list(env.sandbox.service.records())) == 10
        await check_invariants(env, LINES)

    run_simulation(main, hook=fault_on("submit", fault, 4))


def test_unexpected_error_after_the_post_leaves_row_unknown(monkeypatch):
    async def main(env):
        handle, surprises = SimulatedTransport.handle_async_request, [1]

        async def surprising(self, request):
            response = await handle(self, request)
            if request.method == "POST" and surprises:
                surprises.pop()
                raise RuntimeError("nobody thought of this")
            return response

        monkeypatch.setattr(SimulatedTransport, "handle_async_request", surprising)
        summary = await in_process(env, None, manifest(LINES))
        assert (summary.unknown, summary.stored) == (1, 9)
        await check_invariants(env, LINES)

    run_simulation(main)


def test_unrecorded_refusal_leaves_the_row_unknown(monkeypatch):
    create = RecordStore.create

    async def refused(self, name, data):
        if b'"rejected"' in data:
            raise LedgerError("no")
        return await create(self, name, data)

    async def main(env):
        monkeypatch.setattr(RecordStore, "create", refused)
        await in_process(env, None, manifest(LINES))
        status = await read_ledger_status(open_store(env))
        assert status.states[State.UNKNOWN] == 1
        await check_invariants(env, LINES)

    run_simulation(main, hook=fault_on("submit", "limited", 3))
