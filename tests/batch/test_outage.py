"""An outage pauses submitting instead of leaving a thousand rows unknown."""

import asyncio

import pytest

from prefect_flux_kontext.batch.outage import PostGate
from prefect_flux_kontext.client.client import SubmitOutcome
from prefect_flux_kontext.errors import (
    BatchStoppedError,
    InvalidRequestError,
    ReplyLostError,
)
from tests.chaos.simulation import in_process, manifest, simulate

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

ACCEPTED = SubmitOutcome("task_1")
REJECTED = SubmitOutcome(error=InvalidRequestError("400"))
UNKNOWN = SubmitOutcome(error=ReplyLostError("reset"))


class Service:
    """Answer probes with the given outcomes."""

    def __init__(self, *, answers):
        self.answers = answers
        self.probes = 0

    async def probe(self):
        self.probes += 1
        return self.answers


async def post(gate, outcome):
    await gate.acquire()
    await gate.release(outcome)


async def test_unknown_outcomes_keep_their_places_while_the_service_is_down():
    service = Service(answers=False)
    gate = PostGate(3, service.probe, patience_seconds=3600)
    for _ in range(3):
        await post(gate, UNKNOWN)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(600):
            await post(gate, ACCEPTED)
    assert service.probes > 3


async def test_probe_lets_one_post_through_and_its_reply_frees_all_places():
    service = Service(answers=False)
    gate = PostGate(3, service.probe, patience_seconds=3600)
    for _ in range(3):
        await post(gate, UNKNOWN)
    waiting = [asyncio.create_task(post(gate, ACCEPTED)) for _ in range(9)]
    await asyncio.sleep(100)
    assert not any(task.done() for task in waiting)
    service.answers = True
    await asyncio.gather(*waiting)


@pytest.mark.parametrize("reply", [ACCEPTED, REJECTED])
async def test_single_unknown_outcomes_cost_no_pause(reply):
    service = Service(answers=False)
    gate = PostGate(2, service.probe, patience_seconds=3600)
    for _ in range(20):
        await post(gate, UNKNOWN)
        await post(gate, reply)
    assert service.probes == 0


async def test_service_that_stays_down_stops_the_batch():
    gate = PostGate(2, Service(answers=False).probe, patience_seconds=600)
    for _ in range(2):
        await post(gate, UNKNOWN)
    with pytest.raises(BatchStoppedError, match="no usable reply for 10 minutes"):
        await post(gate, ACCEPTED)


async def test_service_that_answers_probes_only_stops_the_batch():
    gate = PostGate(2, Service(answers=True).probe, patience_seconds=600)
    for _ in range(5):
        await post(gate, UNKNOWN)
    with pytest.raises(BatchStoppedError, match="5 submits in a row"):
        await post(gate, UNKNOWN)


async def test_cancelled_waiter_leaves_its_place_to_the_next():
    gate = PostGate(1, Service(answers=True).probe, patience_seconds=600)
    await gate.acquire()
    waiting = [asyncio.create_task(post(gate, ACCEPTED)) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    await gate.release(ACCEPTED)
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert results[1:] == [None, None]


@pytest.mark.parametrize("error", ["trouble_before", "trouble_after", "lost_reply"])
def test_ten_seconds_of_outage_leave_few_rows_unknown(error):
    async def main(env):
        loop = asyncio.get_running_loop()

        def hook(kind, _request, _number):
            in_outage = 5 <= loop.time() - began < 15
            return error if in_outage and kind in {"submit", "other"} else None

        began = loop.time()
        env.hook = hook
        lines = [(f"r{n}", f"row {n}") for n in range(400)]
        return await in_process(env, None, manifest(lines))

    summary = simulate(main, 1)
    assert summary.unknown <= 16
    assert summary.stored == 400 - summary.unknown


def test_service_whose_submits_all_fail_leaves_few_rows_unknown():
    async def main(env):
        env.hook = lambda kind, *_: "trouble_before" if kind == "submit" else None
        result = await in_process(env, None, manifest([(f"r{n}", str(n)) for n in range(200)]))
        return result, env

    error, _ = simulate(main, 1)
    assert isinstance(error, BatchStoppedError)
    assert "in a row" in error.message


def test_batch_stops_paying_when_nothing_can_be_stored():
    async def main(env):
        env.hook = lambda kind, *_: "download_trouble" if kind == "download" else None
        error = await in_process(env, None, manifest([(f"r{n}", str(n)) for n in range(600)]))
        return error, env.posts

    error, posts = simulate(main, 1)
    assert isinstance(error, BatchStoppedError)
    assert "nine of ten" in error.message
    assert posts < 200
