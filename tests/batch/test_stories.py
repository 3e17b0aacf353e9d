"""What a person does with a batch, step by step, on virtual time: the money is always right."""

import asyncio
import csv
import io
import json
import logging
from datetime import timedelta

import pytest

from prefect_flux_kontext.batch import waves
from prefect_flux_kontext.batch.batch import FAILED_ROWS
from prefect_flux_kontext.batch.policy import FailurePolicy
from prefect_flux_kontext.batch.session import ledger_store
from prefect_flux_kontext.batch.status import ledger_status
from prefect_flux_kontext.errors import (
    BatchStoppedError,
    FluxKontextError,
    LedgerError,
    StorageError,
)
from prefect_flux_kontext.ledger.ledger import Ledger
from prefect_flux_kontext.ledger.states import State
from prefect_flux_kontext.ledger.store import RecordStore
from prefect_flux_kontext.manifest.rows import RefusedRow, make_row
from prefect_flux_kontext.models import utc_now
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from prefect_flux_kontext.storage import OutputFolder
from tests.chaos.checker import ids_in, read_all
from tests.chaos.simulation import checked, in_process, manifest, simulate
from tests.chaos.world import Wire, current_process

LINES = [(f"r{n}", f"row number {n}") for n in range(10)]
QUICK = SandboxSettings(mean=0.5, long_edge=16)
SLOW = SandboxSettings(mean=60, long_edge=16)


def on(kind, fault, *numbers):
    """A fault for the n-th requests of a kind."""

    def hook(seen, _what, number):
        return fault if seen == kind and (not numbers or number in numbers) else None

    return hook


def live(main, *, hook=None, settings=QUICK):
    return simulate(main, 1, None, settings, hook=hook)


def store_of(world):
    return ledger_store(OutputFolder(world.url))


async def everything_kept(world, lines, **how):
    found = await checked(world, lines, **how)
    assert not found.problems, str(found)
    status = await ledger_status(store_of(world))
    bill = world.sandbox.service.bill()
    assert round(status.spent, 6) <= float(bill["dollars"]) + 1e-9
    assert float(bill["dollars"]) <= status.spent + status.doubtful + 1e-9
    return found


def test_a_finished_batch_that_runs_again_asks_the_service_for_nothing():
    async def main(world):
        await in_process(world, None, manifest(LINES))
        requests = sum(world.numbers[kind] for kind in ("submit", "download"))
        again = await in_process(world, None, manifest(LINES))
        assert (again.stored, again.already_stored, again.spent) == (10, 10, 0)
        assert sum(world.numbers[kind] for kind in ("submit", "download")) == requests
        await everything_kept(world, LINES, killed=False)

    live(main)


def test_a_reordered_renamed_and_extended_manifest_pays_only_for_what_is_new():
    async def main(world):
        await in_process(world, None, manifest(LINES))
        new = [("new", "another row"), *((f"x-{i}", p) for i, p in reversed(LINES))]
        summary = await in_process(world, None, manifest(new))
        assert (summary.stored, world.posts) == (11, 11)
        await everything_kept(world, [*LINES, *new])

    live(main)


def test_while_all_downloads_stall_submits_go_on_up_to_the_accounts_slots():
    lines = [(f"r{n}", f"row number {n}") for n in range(40)]
    stalled = True

    async def main(world):
        nonlocal stalled
        waves.WAVE_ROWS = 100  # the end of the simulation puts it back
        await in_process(world, 60, manifest(lines))
        bill = world.sandbox.service.bill()
        assert (world.posts, bill["peak_running"]) == (40, 6)
        assert not [name for name in read_all(world.url) if name.endswith(".jpg")]
        stalled = False
        summary = await in_process(world, None, manifest(lines))
        assert (summary.stored, world.posts) == (40, 40)
        await everything_kept(world, lines)

    live(main, hook=lambda kind, *_: "stalled" if kind == "download" and stalled else None)


def test_ids_that_move_to_other_rows_give_each_row_its_own_image_and_lose_none():
    shifted = [(f"r{n}", prompt) for n, (_, prompt) in enumerate([("new", "new"), *LINES])]
    swapped = [(i, p) for (i, _), (_, p) in zip(LINES, reversed(LINES), strict=True)]

    async def main(world):
        for lines in (LINES, shifted, swapped, LINES):
            summary = await in_process(world, None, manifest(lines))
            assert summary.complete, str(summary)
        assert world.posts == 11
        await everything_kept(world, [*LINES, *shifted, *swapped])

    live(main)


@pytest.mark.parametrize("block", [1, 4, 100], ids=["across waves", "mixed", "within a wave"])
def test_equal_rows_are_paid_for_once_and_each_gets_its_image(block):
    lines = [(f"{i}-{n}", p) for n in range(3) for i, p in LINES[:4]]

    async def main(world):
        waves.WAVE_ROWS = block  # the end of the simulation puts it back
        summary = await in_process(world, None, manifest(lines))
        assert (summary.stored, world.posts) == (12, 4)
        await everything_kept(world, lines, killed=False)

    live(main)


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
        status = await ledger_status(store_of(world))
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


def test_what_a_killed_run_has_paid_for_is_collected_without_the_manifest():
    async def main(world):
        assert await in_process(world, 20, manifest(LINES)) is None
        paid = world.posts
        summary = await in_process(world, None, [], only_collect=True)
        assert paid == world.posts
        assert (summary.stored, summary.not_submitted) == (paid, 0)
        await everything_kept(world, LINES, complete=False)
        summary = await in_process(world, None, manifest(LINES))
        assert (summary.stored, world.posts) == (10, 10)
        await everything_kept(world, LINES)

    live(main, settings=SLOW)


def test_the_result_manifest_learns_of_what_killed_runs_have_stored():
    async def main(world):
        # Killed when a row is stored whose wave has not ended.
        assert await in_process(world, 90, manifest(LINES)) is None
        await in_process(world, None, [], only_collect=True)
        files = read_all(world.url)
        lines = [json.loads(line) for line in files["results.jsonl"].splitlines()]
        stored = {line["id"] for line in lines if line["state"] == "stored"}
        assert stored == {name[:-4] for name in files if name.endswith(".jpg")}
        assert any(line["already"] for line in lines)
        assert {line["source"] for line in lines} == {"manifest", "ledger"}
        await in_process(world, None, manifest(LINES))
        lines = list(map(json.loads, read_all(world.url)["results.jsonl"].splitlines()))
        assert [line["state"] for line in lines] == ["stored"] * 10
        assert {line["source"] for line in lines} == {"manifest"}

    live(main, settings=SLOW)


def test_a_row_that_many_killed_runs_have_left_is_collected_and_counted_once():
    async def main(world):
        for _ in range(4):
            assert await in_process(world, 5, manifest(LINES)) is None
        paid = world.posts
        summary = await in_process(world, None, [], only_collect=True)
        assert (summary.rows, summary.stored) == (paid, paid)

    live(main, settings=SLOW)


def test_a_stopped_run_leaves_what_earlier_runs_have_paid_for_to_be_collected():
    """It does not collect them itself, so it must not take them off the list either."""

    async def main(world):
        await in_process(world, 20, manifest(LINES[:5]))
        world.hook = on("submit", "no_balance")
        stopped = await in_process(world, None, manifest([("new", "new")]))
        assert isinstance(stopped, BatchStoppedError)
        world.hook = None
        await everything_kept(world, LINES, complete=False)
        summary = await in_process(world, None, [], only_collect=True)
        assert summary.stored == 5
        assert world.posts == 5

    live(main, settings=SLOW)


def test_a_collection_that_is_refused_takes_nothing_off_the_list():
    async def main(world):
        first = await in_process(world, None, manifest(LINES))
        assert first.outstanding == 10
        # More waves than are under way at once, so that some are not even begun.
        waves.WAVE_ROWS = 1  # the end of the simulation puts it back
        world.hook = on("status", "unauthorized")
        await in_process(world, None, [], only_collect=True)
        world.hook = None
        await everything_kept(world, LINES, complete=False)
        assert (await in_process(world, None, [], only_collect=True)).stored == 10

    live(main, hook=on("download", "download_trouble"))


def test_two_manifests_with_the_same_ids_run_at_once_lose_no_image():
    others = [(row_id, f"{prompt} in another style") for row_id, prompt in LINES]

    async def main(world):
        runs = [in_process(world, None, manifest(lines)) for lines in (LINES, others)]
        await asyncio.gather(*runs)
        await everything_kept(world, [*LINES, *others])

    live(main)


def test_settling_a_row_later_loses_no_other_row_from_the_count():
    """The part of the wave that it was in has the others: it must not be written over."""

    async def main(world):
        await in_process(world, None, manifest(LINES))
        await in_process(world, None, manifest(LINES), resubmit=True)
        status = await ledger_status(store_of(world))
        assert status.states == {State.STORED: 10}
        assert status.spent == pytest.approx(0.30)

    live(main, hook=on("submit", "lost_reply", 2))


def test_a_damaged_record_stops_only_its_own_row():
    async def main(world):
        await in_process(world, 20, manifest(LINES))
        files = read_all(world.url)
        name = next(name for name in files if name.endswith("posted.json"))
        await RecordStore(world.url).replace(name, b"{")
        assert world.posts > 2
        collected = await in_process(world, None, [], only_collect=True)
        assert (collected.stored, collected.failed) == (world.posts - 1, 1)
        assert name in collected.failures[0].message
        summary = await in_process(world, None, manifest(LINES))
        assert (summary.stored, summary.failed, world.posts) == (9, 1, 10)
        await RecordStore(world.url).replace(name, files[name])
        assert (await in_process(world, None, manifest(LINES))).stored == 10
        await everything_kept(world, LINES)

    live(main, settings=SLOW)


def test_a_damaged_sign_of_life_leaves_its_rows_alone():
    async def main(world):
        await in_process(world, 20, manifest(LINES[:5]))
        name = next(name for name in read_all(world.url) if "/owners/" in name)
        await RecordStore(world.url).replace(name, b"")
        assert (await in_process(world, None, manifest(LINES[5:]))).stored == 5
        await RecordStore(world.url).remove(name)
        assert (await in_process(world, None, [], only_collect=True)).stored == 5

    live(main, settings=SLOW)


def test_a_wave_that_cannot_be_opened_pays_for_none_of_its_rows_and_the_others_end(monkeypatch):
    replace = RecordStore.replace

    async def refused(self, name, data):
        if name.endswith("-000002.open.json"):
            raise LedgerError("no")
        await replace(self, name, data)

    async def main(world):
        monkeypatch.setattr(RecordStore, "replace", refused)
        assert isinstance(await in_process(world, None, manifest(LINES)), LedgerError)
        monkeypatch.setattr(RecordStore, "replace", replace)
        found = await everything_kept(world, LINES, complete=False)
        assert found.stored == world.posts
        assert (await in_process(world, None, manifest(LINES))).stored == 10

    live(main)


def test_a_wave_that_cannot_be_closed_is_read_again_later(monkeypatch):
    replace = RecordStore.replace

    async def refused(self, name, data):
        if name.startswith("waves/") and name.endswith(".jsonl"):
            raise LedgerError("no")
        await replace(self, name, data)

    async def main(world):
        monkeypatch.setattr(RecordStore, "replace", refused)
        # Collecting fails in the same way; it takes nothing off the list then.
        await in_process(world, None, manifest(LINES))
        monkeypatch.setattr(RecordStore, "replace", replace)
        await everything_kept(world, LINES)
        await in_process(world, None, [], only_collect=True)
        assert (await ledger_status(store_of(world))).states == {State.STORED: 10}

    live(main)


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
        status = await ledger_status(store_of(world))
        assert status.states[State.UNKNOWN] == 1
        await everything_kept(world, LINES)

    live(main, hook=on("submit", "limited", 3))


def test_a_stop_does_not_wait_until_a_refused_submit_may_be_sent_again():
    async def main(world):
        loop = asyncio.get_running_loop()
        began = loop.time()
        assert isinstance(await in_process(world, None, manifest(LINES)), BatchStoppedError)
        assert loop.time() - began < 30

    def hook(kind, _request, number):
        if kind != "submit":
            return None
        return "no_balance" if number == 1 else "limited_for_long"

    live(main, hook=hook)


def test_failed_rows_are_a_manifest_and_only_they_are_paid_for_again():
    lines = [*LINES, ("bad", "nsfw")]
    unlucky = SandboxSettings(mean=0.5, long_edge=16, fail_rate=0.45)

    async def main(world):
        first = await in_process(world, None, manifest(lines))
        assert first.failed >= 2
        failed = read_all(world.url)[FAILED_ROWS]
        assert len(ids_in(failed)) == first.failed
        paid = world.posts
        cells = csv.DictReader(io.StringIO(failed.decode()))
        rows = [make_row(n, line) for n, line in enumerate(cells, start=2)]
        # As it is: it pays for nothing, for what failed has failed.
        again = await in_process(world, None, rows)
        assert (again.failed, world.posts) == (first.failed, paid)
        retried = await in_process(world, None, rows, retry=True)
        assert retried.rows == first.failed
        prompts = [prompt for _, prompt in world.log[paid:]]
        assert "nsfw" not in prompts
        assert set(prompts) <= {row.request.prompt for row in rows}
        assert len(prompts) >= first.failed - 1
        await everything_kept(world, lines)

    live(main, settings=unlucky)


def test_a_stopped_retry_keeps_all_failed_rows_in_the_manifest():
    unlucky = SandboxSettings(mean=0.5, long_edge=16, fail_rate=0.45)

    async def main(world):
        await in_process(world, None, manifest(LINES))
        failed = read_all(world.url)[FAILED_ROWS]
        rows = [line for line in LINES if line[0] in ids_in(failed)]
        assert len(rows) > 1
        world.hook = on("submit", "no_balance")
        await in_process(world, None, manifest(rows), retry=True)
        assert read_all(world.url)[FAILED_ROWS] == failed

    live(main, settings=unlucky)


def test_a_refused_row_costs_nothing_and_is_written_down():
    refused = RefusedRow("bad", 3, "no prompt", {"id": "bad"})

    async def main(world):
        summary = await in_process(world, None, [*manifest(LINES[:2]), refused])
        assert (summary.stored, summary.failed, world.posts) == (2, 1, 2)
        assert ids_in(read_all(world.url)[FAILED_ROWS]) == ["bad"]
        await in_process(world, None, manifest(LINES[:2]))
        assert FAILED_ROWS not in read_all(world.url)

    live(main)


@pytest.mark.parametrize("refusal", ["unauthorized", "no_balance"])
def test_an_account_that_is_refused_leaves_the_rest_unsubmitted(refusal):
    async def main(world):
        stopped = await in_process(world, None, manifest(LINES))
        assert isinstance(stopped, BatchStoppedError)
        assert world.posts == 3
        assert world.numbers["submit"] <= 3 + 3
        world.hook = None
        found = await everything_kept(world, LINES, complete=False)
        assert found.stored == 3
        assert (await in_process(world, None, manifest(LINES))).stored == 10
        assert world.posts == 10

    def hook(kind, _request, number):
        return refusal if kind == "submit" and number > 3 else None

    live(main, hook=hook)


def test_a_batch_of_which_nearly_all_fails_is_stopped():
    lines = [(f"r{n}", f"nsfw {n}") for n in range(200)]

    async def main(world):
        stopped = await in_process(world, None, manifest(lines))
        assert isinstance(stopped, BatchStoppedError)
        assert 20 <= world.posts < 45
        await everything_kept(world, lines, complete=False)

    live(main)


def test_an_old_failure_for_want_of_credit_does_not_stop_the_next_run():
    async def main(world):
        policy = FailurePolicy(stop=["CONTENT_VIOLATION"], never=[])
        lines = [("a", "nsfw"), *LINES]
        first = await in_process(world, None, manifest(lines), policy=policy)
        assert isinstance(first, BatchStoppedError)
        second = await in_process(world, None, manifest(lines), policy=policy)
        assert (second.stored, second.failed) == (10, 1)

    live(main)


@pytest.mark.parametrize(
    ("days", "told", "code"), [(5, False, None), (13, True, None), (16, True, "expired")]
)
def test_a_paid_result_near_its_end_is_told_and_a_lost_one_is_failed(caplog, days, told, code):
    async def main(world):
        await in_process(world, 30, manifest(LINES[:1]))
        files = read_all(world.url)
        [name] = [name for name in files if name.endswith("posted.json")]
        posted = json.loads(files[name])
        posted["at"] = (utc_now() - timedelta(days=days)).isoformat()
        await RecordStore(world.url).replace(name, json.dumps(posted).encode())
        if code:
            world.hook = on("download", "download_trouble")
        with caplog.at_level(logging.WARNING):
            summary = await in_process(world, None, [], only_collect=True)
        assert ("its result expires in" in caplog.text) is told
        assert summary.stored == (code is None)
        assert list(summary.reasons) == ([code] if code else [])

    live(main, settings=SLOW)


def test_an_output_that_refuses_an_old_result_does_not_make_it_expired(monkeypatch):
    async def main(world):
        await in_process(world, 30, manifest(LINES[:1]))
        files = read_all(world.url)
        [name] = [name for name in files if name.endswith("posted.json")]
        posted = json.loads(files[name])
        posted["at"] = (utc_now() - timedelta(days=20)).isoformat()
        await RecordStore(world.url).replace(name, json.dumps(posted).encode())
        write = OutputFolder.write_apart

        async def refused(_self, _names, _data):
            raise StorageError("no room")

        monkeypatch.setattr(OutputFolder, "write_apart", refused)
        summary = await in_process(world, None, [], only_collect=True)
        assert summary.outstanding == 1
        monkeypatch.setattr(OutputFolder, "write_apart", write)
        assert (await in_process(world, None, [], only_collect=True)).stored == 1

    live(main, settings=SLOW)


def test_status_counts_every_row_and_every_dollar():
    lines = [*LINES, ("bad", "nsfw")]

    async def main(world):
        await in_process(world, 30, manifest(lines))
        status = await ledger_status(store_of(world))
        bill = world.sandbox.service.bill()
        known = status.states[State.ACCEPTED] + status.states[State.STORED]
        known += status.states[State.FAILED]
        assert known + status.states[State.UNKNOWN] >= bill["accepted"] >= known
        assert status.outstanding == sorted(
            status.outstanding, key=lambda entry: entry.task.submitted_at
        )
        await in_process(world, None, manifest(lines))
        status = await ledger_status(store_of(world))
        assert status.spent == pytest.approx(float(world.sandbox.service.bill()["dollars"]))
        assert status.states == {State.STORED: 10, State.FAILED: 1}

    live(main, settings=SLOW)
