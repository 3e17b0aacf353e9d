"""What is run again, reordered, renamed, moved or doubled is paid for once, on virtual time."""

import asyncio

import pytest

from prefect_flux_kontext.batch import waves
from tests.batch.story import LINES, SLOW, everything_kept, live
from tests.chaos.checker import read_all
from tests.chaos.simulation import in_process, manifest


def test_a_finished_batch_that_runs_again_asks_the_service_for_nothing():
    async def main(world):
        await in_process(world, None, manifest(LINES))
        requests = sum(world.numbers[kind] for kind in ("submit", "download"))
        again = await in_process(world, None, manifest(LINES))
        assert (again.stored, again.already_stored, again.spent) == (10, 10, 0)
        assert sum(world.numbers[kind] for kind in ("submit", "download")) == requests
        await everything_kept(world, LINES, killed=False)

    live(main)


@pytest.mark.parametrize("killed", [None, 20])
def test_an_equal_row_of_a_later_wave_was_stored_by_this_run_whoever_has_paid(killed):
    async def main(world):
        waves.WAVE_ROWS = 1  # the end of the simulation puts it back
        if killed is not None:
            assert await in_process(world, killed, manifest([("a", "same")])) is None
            assert world.posts == 1
        rows = manifest([("a", "same"), ("b", "same"), ("c", "same")])
        summary = await in_process(world, None, rows)
        assert (summary.stored, summary.already_stored, world.posts) == (3, 0, 1)

    live(main, settings=SLOW)


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


def test_two_manifests_with_the_same_ids_run_at_once_lose_no_image():
    others = [(row_id, f"{prompt} in another style") for row_id, prompt in LINES]

    async def main(world):
        runs = [in_process(world, None, manifest(lines)) for lines in (LINES, others)]
        await asyncio.gather(*runs)
        await everything_kept(world, [*LINES, *others])

    live(main)
