"""Rows of which nobody knows whether they are paid for are held, named and settled."""

import asyncio

import pytest

from prefect_flux_kontext.batch.collection import read_ledger_status
from prefect_flux_kontext.errors import (
    FluxKontextError,
    LedgerError,
)
from prefect_flux_kontext.ledger.ledger import Ledger
from prefect_flux_kontext.ledger.records import State
from prefect_flux_kontext.ledger.store import RecordStore
from tests.batch.story import LINES, everything_kept, live, on, store_of
from tests.chaos.simulation import checked, in_process, manifest
from tests.chaos.world import Wire, current_process


def test_an_equal_row_after_a_lost_reply_is_unknown_and_waits_for_nobody():
    """Its intent is our own, and we live: waiting for ourselves would never end."""
    lines = [("a", "same"), ("b", "same"), *LINES]

    async def main(world):
        summary = await in_process(world, 100, manifest(lines))
        assert (summary.unknown, summary.stored) == (2, 10)
        await everything_kept(world, lines)

    def hook(kind, request, _number):
        return "lost_reply" if kind == "submit" and b'"same"' in request.content else None

    live(main, hook=hook)


def test_an_equal_row_after_a_lost_reply_is_not_paid_for_again_by_the_users_word():
    lines = [("a", "same"), ("b", "same")]

    async def main(world):
        await in_process(world, None, manifest(lines), resubmit=True)
        assert world.posts == 1

    live(main, hook=on("submit", "lost_reply", 1))


def test_two_runs_that_lost_a_reply_each_do_not_wait_for_one_another():
    unlucky = set()

    def hook(kind, _request, _number):
        process = current_process.get()
        if kind != "submit" or process.number in unlucky:
            return None
        unlucky.add(process.number)
        return "lost_reply"

    async def main(world):
        both = [in_process(world, 5_000, manifest(order)) for order in (LINES, LINES[::-1])]
        summaries = await asyncio.gather(*both)
        assert all(summary is not None for summary in summaries)
        assert [summary.unknown for summary in summaries] == [2, 2]
        found = await everything_kept(world, LINES)
        assert found.unknown == 2

    live(main, hook=hook)


def test_unknown_rows_are_held_until_a_person_says_to_pay_again():
    async def main(world):
        await in_process(world, None, manifest(LINES))
        for _ in range(2):
            summary = await in_process(world, None, manifest(LINES))
            assert (summary.unknown, world.posts) == (2, 10)
        summary = await in_process(world, None, manifest(LINES), resubmit=True)
        assert (summary.stored, world.posts) == (10, 12)
        found = await checked(world, LINES)
        assert not found.problems, str(found)

    live(main, hook=on("submit", "lost_reply", 3, 7))


@pytest.mark.parametrize("accepted", [True, False])
def test_a_person_settles_an_unknown_row(accepted):
    fault = "lost_reply" if accepted else "trouble_before"

    async def main(world):
        await in_process(world, None, manifest(LINES))
        status = await read_ledger_status(store_of(world))
        assert [status.states[State.UNKNOWN], len(status.unknown)] == [1, 1]
        assert status.doubtful == pytest.approx(0.03)
        [entry] = status.unknown
        ledger = Ledger(store_of(world), "person", {})
        if accepted:
            prompt = entry.intent.request.prompt
            records = world.sandbox.service.records()
            [task] = [r["taskId"] for r in records if r["prompt"] == prompt]
            await ledger.accepted(entry, task)
            summary = await in_process(world, None, [], only_collect=True)
            assert (summary.rows, summary.stored) == (1, 1)
        else:
            await ledger.rejected(entry, FluxKontextError("no", code="resolved"))
            summary = await in_process(world, None, manifest(LINES))
            assert summary.stored == 10
        assert len(list(world.sandbox.service.records())) == 10
        await everything_kept(world, LINES)

    live(main, hook=on("submit", fault, 4))


def test_a_surprise_after_the_post_leaves_the_row_unknown_and_named(monkeypatch):
    async def main(world):
        handle, surprises = Wire.handle_async_request, [1]

        async def surprising(self, request):
            response = await handle(self, request)
            if request.method == "POST" and surprises:
                surprises.pop()
                raise RuntimeError("nobody thought of this")
            return response

        monkeypatch.setattr(Wire, "handle_async_request", surprising)
        summary = await in_process(world, None, manifest(LINES))
        assert (summary.unknown, summary.stored) == (1, 9)
        await everything_kept(world, LINES)

    live(main)


def test_a_refusal_that_cannot_be_recorded_leaves_the_row_unknown_and_named(monkeypatch):
    create = RecordStore.create

    async def refused(self, name, data):
        if b'"rejected"' in data:
            raise LedgerError("no")
        return await create(self, name, data)

    async def main(world):
        monkeypatch.setattr(RecordStore, "create", refused)
        await in_process(world, None, manifest(LINES))
        status = await read_ledger_status(store_of(world))
        assert status.states[State.UNKNOWN] == 1
        await everything_kept(world, LINES)

    live(main, hook=on("submit", "limited", 3))
