"""Rows that are rerun, reordered, renamed, moved or doubled are paid for once."""

import asyncio

import pytest

from prefect_flux_kontext.batch import waves
from tests.batch.simulated import LINES, SLOW, check_invariants, run_simulation
from tests.chaos.checker import read_all
from tests.chaos.simulation import in_process, manifest


def test_rerun_of_a_finished_batch_sends_no_request():
    async def main(env):
        await in_process(env, None, manifest(LINES))
        requests = sum(env.numbers[kind] for kind in ("submit", "download"))
        again = await in_process(env, None, manifest(LINES))
        assert (again.stored, again.already_stored, again.spent) == (10, 10, 0)
        assert sum(env.numbers[kind] for kind in ("submit", "download")) == requests
        await check_invariants(env, LINES, killed=False)

    run_simulation(main)


@pytest.mark.parametrize("killed", [None, 20])
def test_equal_row_of_a_later_wave_counts_as_stored_by_this_run(killed):
    async def main(env):
        waves.WAVE_ROWS = 1  # the end of the simulation puts it back
        if killed is not None:
            assert await in_process(env, killed, manifest([("a", "same")])) is None
            assert env.posts == 1
        rows = manifest([("a", "same"), ("b", "same"), ("c", "same")])
        summary = await in_process(env, None, rows)
        assert (summary.stored, summary.already_stored, env.posts) == (3, 0, 1)

    run_simulation(main, settings=SLOW)


def test_changed_manifest_pays_only_for_new_rows():
    async def main(env):
        await in_process(env, None, manifest(LINES))
        new = [("new", "another row"), *((f"x-{i}", p) for i, p in reversed(LINES))]
        summary = await in_process(env, None, manifest(new))
        assert (summary.stored, env.posts) == (11, 11)
        await check_invariants(env, [*LINES, *new])

    run_simulation(main)


def test_submits_continue_while_downloads_stall():
    lines = [(f"r{n}", f"row number {n}") for n in range(40)]
    stalled = True

    async def main(env):
        nonlocal stalled
        waves.WAVE_ROWS = 100  # the end of the simulation puts it back
        await in_process(env, 60, manifest(lines))
        bill = env.sandbox.service.bill()
        assert (env.posts, bill["peak_running"]) == (40, 6)
        assert not [name for name in read_all(env.url) if name.endswith(".jpg")]
        stalled = False
        summary = await in_process(env, None, manifest(lines))
        assert (summary.stored, env.posts) == (40, 40)
        await check_invariants(env, lines)

    run_simulation(
        main, hook=lambda kind, *_: "stalled" if kind == "download" and stalled else None
    )


def test_moved_ids_keep_each_rows_image():
    shifted = [(f"r{n}", prompt) for n, (_, prompt) in enumerate([("new", "new"), *LINES])]
    swapped = [(i, p) for (i, _), (_, p) in zip(LINES, reversed(LINES), strict=True)]

    async def main(env):
        for lines in (LINES, shifted, swapped, LINES):
            summary = await in_process(env, None, manifest(lines))
            assert summary.complete, str(summary)
        assert env.posts == 11
        await check_invariants(env, [*LINES, *shifted, *swapped])

    run_simulation(main)


@pytest.mark.parametrize("block", [1, 4, 100], ids=["across waves", "mixed", "within a wave"])
def test_equal_rows_are_paid_once_and_all_stored(block):
    lines = [(f"{i}-{n}", p) for n in range(3) for i, p in LINES[:4]]

    async def main(env):
        waves.WAVE_ROWS = block  # the end of the simulation puts it back
        summary = await in_process(env, None, manifest(lines))
        assert (summary.stored, env.posts) == (12, 4)
        await check_invariants(env, lines, killed=False)

    run_simulation(main)


def test_concurrent_manifests_with_equal_ids_lose_no_image():
    others = [(row_id, f"{prompt} in another style") for row_id, prompt in LINES]

    async def main(env):
        runs = [in_process(env, None, manifest(lines)) for lines in (LINES, others)]
        await asyncio.gather(*runs)
        await check_invariants(env, [*LINES, *others])

    run_simulation(main)
