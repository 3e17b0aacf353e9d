"""`kill -9` at any moment, then the same command again: nothing is paid twice or lost."""

import random

import pytest

from prefect_flux_kontext.sandbox.faults.plan import FaultPlan
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from tests.chaos.processes import Batch

QUICK = SandboxSettings(mean=0.3, long_edge=16, fail_rate=0.0)
TROUBLE = FaultPlan(
    seed=1,
    faults=[
        "submit:lost-reply=0.01",
        "submit:trouble-after=0.01",
        "submit:unavailable=0.01",
        "submit:reset=0.01",
        "submit:limited=0.005",
        "submit:limited-in-200=0.005",
        "status:unavailable=0.02",
        "status:closed=0.02",
        "download:unavailable=0.02",
        "download:half=0.02",
    ],
)


def lines(number, start=0):
    return [(f"row-{n}", f"lighthouse number {n}") for n in range(start, start + number)]


@pytest.fixture
def service():
    with running_sandbox(QUICK) as sandbox:
        yield sandbox


def assert_no_problems(batch):
    found = batch.check()
    assert not found.problems, found
    assert found.stored + found.failed + found.unknown == found.rows
    return found


def test_batch_killed_at_random_is_finished_by_a_rerun(service, tmp_path):
    rng = random.Random(1)
    service.active_faults.change(TROUBLE)
    batch = Batch(service, tmp_path)
    batch.write(lines(80))
    for _ in range(6):
        batch.run_and_kill(rng.uniform(0.1, 0.6))
    service.active_faults.change(FaultPlan())
    batch.run()
    assert batch.kills >= 3
    found = assert_no_problems(batch)
    assert found.unknown <= 8 * batch.kills + 6
    before = batch.accepted
    batch.run()
    assert batch.accepted == before


POINTS = [
    (point, when, number)
    for point, numbers in {
        "create": (1, 4, 7),
        "replace": (2, 3),
        "remove": (1, 2),
        "image": (2,),
        "request": (2, 4),
        "download": (2,),
    }.items()
    for when in ("before", "after")
    for number in numbers
]


@pytest.mark.timeout(400)  # 44 processes, one after the other
def test_batch_killed_at_any_step_is_finished_by_a_rerun(service, tmp_path):
    for number, kill_point in enumerate(POINTS):
        folder = tmp_path / "-".join(map(str, kill_point))
        folder.mkdir()
        batch = Batch(service, folder, FLUX_KONTEXT_GALLERY_IMAGES="0")
        batch.write(lines(3, start=1000 * number))
        batch.run(kill_point=kill_point)
        ended = batch.run()
        found = batch.check()
        assert not found.problems, (kill_point, found, ended.said)
        assert found.unknown <= 3
        assert (ended.status == 0) == (found.unknown == 0), (kill_point, ended)


def test_two_concurrent_runs_pay_each_row_once(service, tmp_path):
    batch = Batch(service, tmp_path)
    batch.write(lines(30))
    both = [batch.start_run() for _ in range(2)]
    assert [running.end().status for running in both] == [0, 0]
    assert batch.accepted == 30
    assert assert_no_problems(batch).stored == 30


def test_five_runs_with_kills_pay_each_row_once(service, tmp_path):
    batch = Batch(service, tmp_path)
    batch.write(lines(30))
    rng = random.Random(5)
    running = [batch.start_run() for _ in range(5)]
    for victim in running[:3]:
        victim.lives_for(rng.uniform(0.05, 0.3))
        victim.kill()
    for survivor in running[3:]:
        survivor.end()
    batch.run()
    assert_no_problems(batch)
