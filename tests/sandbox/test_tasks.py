import asyncio
import random
import statistics
import time

import pytest

from prefect_flux_kontext.sandbox.service import LatencyModel
from tests.sandbox.helpers import result_url, sandbox_client

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


async def test_a_task_is_pending_then_processing_then_a_success():
    async with sandbox_client(mean=30, spread=0) as sandbox:
        task_id = await sandbox.accepted()
        seen = []
        for pause in (0, 2.9, 0.2, 26.8, 0.2):
            await asyncio.sleep(pause)
            seen.append((await sandbox.data(task_id))["state"])
        assert seen == ["pending", "pending", "processing", "processing", "success"]


async def test_times_are_unix_milliseconds_once_known():
    async with sandbox_client(mean=30, spread=0) as sandbox:
        task_id = await sandbox.accepted()
        running = await sandbox.data(task_id)
        assert running.keys() == {"taskId", "state", "createTime"}
        assert abs(running["createTime"] / 1000 - time.time()) < 3600
        await asyncio.sleep(45)
        done = await sandbox.data(task_id)
        assert done["createTime"] == running["createTime"]
        assert done["completeTime"] == done["createTime"] + 30_000
        assert done["costTime"] == 30_000


async def test_a_success_carries_an_absolute_result_url():
    async with sandbox_client() as sandbox:
        task_id = await sandbox.accepted(output_format="png")
        url = result_url(await sandbox.finished(task_id))
        assert url == f"http://sandbox.test/results/{task_id}/1.png"


@pytest.mark.parametrize("prompt", ["a NSFW cat", "nsfw", "is it nsfw?"])
async def test_the_word_nsfw_breaks_the_content_rules(prompt):
    async with sandbox_client() as sandbox:
        data = await sandbox.finished(await sandbox.accepted(prompt))
        assert (data["state"], data["failCode"]) == ("failed", "CONTENT_VIOLATION")
        assert data["failMsg"]
        assert "resultJson" not in data


async def test_a_word_that_only_contains_nsfw_is_fine():
    async with sandbox_client() as sandbox:
        data = await sandbox.finished(await sandbox.accepted("nsfwords"))
        assert data["state"] == "success"


async def test_the_fail_rate_fails_about_that_share_and_charges_for_it():
    async with sandbox_client(mean=0, fail_rate=0.3) as sandbox:
        ids = [await sandbox.accepted(f"prompt {number}") for number in range(200)]
        states = [await sandbox.data(task_id) for task_id in ids]
        failed = [data for data in states if data["state"] == "failed"]
        assert 40 <= len(failed) <= 80
        assert {data["failCode"] for data in failed} == {"GENERATION_FAILED"}
        assert (await sandbox.bill())["dollars"] == "6.000000"


def test_the_latency_curve_has_the_mean_and_spread_that_were_set():
    rng, curve = random.Random(1), LatencyModel(30, 0.35)
    times = [curve.draw(rng) for _ in range(20_000)]
    assert statistics.mean(times) == pytest.approx(30, rel=0.02)
    assert statistics.stdev(times) == pytest.approx(10.5, rel=0.05)


@pytest.mark.parametrize("spread", [0, 0.35])
def test_a_mean_of_zero_is_ready_at_once(spread):
    assert LatencyModel(0, spread).draw(random.Random(1)) == 0


async def _run(seed, prompts):
    """What every prompt's tasks came to: ids, ends and outcomes."""
    async with sandbox_client(seed=seed, fail_rate=0.5) as sandbox:
        ids = [(prompt, await sandbox.accepted(prompt)) for prompt in prompts]
        ends = [(prompt, await sandbox.finished(task_id)) for prompt, task_id in ids]
        return sorted(
            (prompt, data["taskId"], data["state"], data["costTime"]) for prompt, data in ends
        )


async def test_seed_repeats_a_run_in_any_order():
    prompts = ["a", "b", "c", "a", "d", "a"]
    first = await _run(7, prompts)
    assert await _run(7, prompts[::-1]) == first
    assert len({task_id for _, task_id, _, _ in first}) == 6
    assert await _run(8, prompts) != first


async def test_callback_tokens_and_reference_ports_keep_the_run():
    ids = set()
    for number in range(3):
        async with sandbox_client() as sandbox:
            top = {"callback_url": f"http://127.0.0.1:1/{number}"}
            urls = [f"http://127.0.0.1:{9000 + number}/references/cat.png"]
            ids.add(await sandbox.accepted(image_urls=urls, top=top))
    assert len(ids) == 1
