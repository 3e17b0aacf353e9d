"""Failed rows and stopped batches: what is recorded, and what is paid for again."""

import asyncio
import csv
import io

import pytest

from prefect_flux_kontext.batch.policy import FailurePolicy
from prefect_flux_kontext.batch.runner import FAILED_ROWS
from prefect_flux_kontext.errors import (
    BatchStoppedError,
)
from prefect_flux_kontext.manifest.row import RefusedRow, make_row
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from tests.batch.simulated import LINES, check_invariants, fault_on, run_simulation
from tests.chaos.checker import ids_in, read_all
from tests.chaos.simulation import in_process, manifest


@pytest.mark.parametrize(
    "code",
    [
        "CONTENT_VIOLATION",
        "NSFW",
        "NSFW_DETECTED",
        "SensitiveContent",
        "SensitiveContentDetected",
        "InputImageSensitiveContentDetected",
        "InputOutputSensitiveContentDetected",
        "ProhibitedContentDetected",
        "PromptLengthExceeded",
        "PROMPT_TOO_LONG",
        "INVALID_PROMPT",
    ],
)
def test_refused_content_is_never_paid_for_again(code):
    assert FailurePolicy().decide(code, 1) == "leave"
    assert FailurePolicy().decide(code, 1, asked_to_retry=True) == "leave"


@pytest.mark.parametrize("code", ["INVALID_IMAGE_URL", "SomethingNew", "501", None])
def test_other_failures_are_paid_for_again_only_if_asked(code):
    assert FailurePolicy().decide(code, 1) == "leave"
    assert FailurePolicy().decide(code, 1, asked_to_retry=True) == "retry"


def test_stop_does_not_wait_for_a_rate_limit():
    async def main(env):
        loop = asyncio.get_running_loop()
        began = loop.time()
        assert isinstance(await in_process(env, None, manifest(LINES)), BatchStoppedError)
        assert loop.time() - began < 30

    def hook(kind, _request, number):
        if kind != "submit":
            return None
        return "no_balance" if number == 1 else "limited_for_long"

    run_simulation(main, hook=hook)


def test_retry_pays_only_for_failed_rows():
    lines = [*LINES, ("bad", "nsfw")]
    unlucky = SandboxSettings(mean=0.5, long_edge=16, fail_rate=0.45)

    async def main(env):
        first = await in_process(env, None, manifest(lines))
        assert first.failed >= 2
        failed = read_all(env.url)[FAILED_ROWS]
        assert len(ids_in(failed)) == first.failed
        paid = env.posts
        cells = csv.DictReader(io.StringIO(failed.decode()))
        rows = [make_row(n, line) for n, line in enumerate(cells, start=2)]
        # Run unchanged, it pays for nothing: a failed row stays failed.
        again = await in_process(env, None, rows)
        assert (again.failed, env.posts) == (first.failed, paid)
        retried = await in_process(env, None, rows, retry=True)
        assert retried.rows == first.failed
        prompts = [prompt for _, prompt in env.log[paid:]]
        assert "nsfw" not in prompts
        assert set(prompts) <= {row.request.prompt for row in rows}
        assert len(prompts) >= first.failed - 1
        await check_invariants(env, lines)

    run_simulation(main, settings=unlucky)


def test_stopped_retry_keeps_the_failed_rows_file():
    unlucky = SandboxSettings(mean=0.5, long_edge=16, fail_rate=0.45)

    async def main(env):
        await in_process(env, None, manifest(LINES))
        failed = read_all(env.url)[FAILED_ROWS]
        rows = [line for line in LINES if line[0] in ids_in(failed)]
        assert len(rows) > 1
        env.hook = fault_on("submit", "no_balance")
        await in_process(env, None, manifest(rows), retry=True)
        assert read_all(env.url)[FAILED_ROWS] == failed

    run_simulation(main, settings=unlucky)


def test_refused_row_costs_nothing_and_is_reported():
    refused = RefusedRow("bad", 3, "no prompt", {"id": "bad"})

    async def main(env):
        summary = await in_process(env, None, [*manifest(LINES[:2]), refused])
        assert (summary.stored, summary.failed, env.posts) == (2, 1, 2)
        assert ids_in(read_all(env.url)[FAILED_ROWS]) == ["bad"]
        await in_process(env, None, manifest(LINES[:2]))
        assert ids_in(read_all(env.url)[FAILED_ROWS]) == ["bad"]
        await in_process(env, None, manifest([*LINES[:2], ("bad", "a prompt")]))
        assert FAILED_ROWS not in read_all(env.url)

    run_simulation(main)


@pytest.mark.parametrize("refusal", ["unauthorized", "no_balance"])
def test_refused_account_leaves_the_rest_unsubmitted(refusal):
    async def main(env):
        stopped = await in_process(env, None, manifest(LINES))
        assert isinstance(stopped, BatchStoppedError)
        assert env.posts == 3
        assert env.numbers["submit"] <= 3 + 3
        env.hook = None
        found = await check_invariants(env, LINES, complete=False)
        assert found.stored == 3
        assert (await in_process(env, None, manifest(LINES))).stored == 10
        assert env.posts == 10

    def hook(kind, _request, number):
        return refusal if kind == "submit" and number > 3 else None

    run_simulation(main, hook=hook)


def test_batch_stops_when_nearly_all_rows_fail():
    lines = [(f"r{n}", f"nsfw {n}") for n in range(200)]

    async def main(env):
        stopped = await in_process(env, None, manifest(lines))
        assert isinstance(stopped, BatchStoppedError)
        assert 20 <= env.posts < 45
        await check_invariants(env, lines, complete=False)

    run_simulation(main)


def test_old_stop_code_does_not_stop_the_next_run():
    async def main(env):
        policy = FailurePolicy(stop=["CONTENT_VIOLATION"], never=[])
        lines = [("a", "nsfw"), *LINES]
        first = await in_process(env, None, manifest(lines), policy=policy)
        assert isinstance(first, BatchStoppedError)
        second = await in_process(env, None, manifest(lines), policy=policy)
        assert (second.stored, second.failed) == (10, 1)

    run_simulation(main)
