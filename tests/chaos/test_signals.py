"""Signals, suspended processes, refused accounts and full disks, with real processes."""

import os
import re
import signal
from pathlib import Path

import pytest

from prefect_flux_kontext.sandbox.faults.plan import FaultPlan
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from tests.chaos.processes import Batch
from tests.chaos.test_kills import assert_no_problems, lines
from tests.support.s3 import s3_server

QUICK = SandboxSettings(mean=0.3, long_edge=16)


@pytest.fixture
def service():
    with running_sandbox(QUICK) as sandbox:
        yield sandbox


@pytest.mark.parametrize(
    ("number", "status", "accepted"), [(signal.SIGTERM, 143, 20), (signal.SIGINT, 130, 1)]
)
def test_signal_bills_only_posts_in_flight(service, tmp_path, number, status, accepted):
    service.active_faults.change(FaultPlan(faults=["submit:slow"], slow=0.05))
    batch = Batch(service, tmp_path)
    batch.write(lines(50))
    running = batch.start_run()
    batch.until(lambda: batch.accepted >= accepted, running)
    running.send(number)
    before = batch.accepted
    ended = running.end()
    assert ended.status == status, ended
    # Of the eight POSTs in flight, some were counted before the signal was sent.
    assert batch.accepted - before <= 8
    found = batch.check(killed=False, complete=False)
    assert not found.problems, found
    assert found.unknown == 0
    outstanding = batch.accepted - found.stored
    assert outstanding > 0
    reported = re.search(r"(\d+) rows? (?:is|are) paid for and not yet stored", ended.said)
    # A row that is being recorded as stored is reported as outstanding.
    assert outstanding <= int(reported[1]) <= outstanding + 16, ended.said
    assert f"flux-kontext collect file://{batch.output}" in ended.said
    paid = batch.accepted
    collected = batch.command("collect")
    assert (collected.status, batch.accepted) == (0, paid), collected
    assert batch.run().status == 0
    assert batch.accepted == 50
    assert assert_no_problems(batch).stored == 50


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_repeated_signal_does_not_discard_replies(service, tmp_path, number):
    service.active_faults.change(FaultPlan(faults=["submit:slow"], slow=1.0))
    batch = Batch(service, tmp_path)
    batch.write(lines(50))
    running = batch.start_run()
    batch.until(lambda: service.active_faults.numbers["submit"] >= 8, running)
    for _ in range(3):
        running.send(number)
        running.lives_for(0.1)
    ended = running.end()
    assert ended.status == 128 + number, ended
    assert batch.accepted >= 8
    found = batch.check(killed=False, complete=False)
    assert not found.problems, found
    assert found.unknown == 0


def test_stopped_run_waits_for_a_limited_time(service, tmp_path):
    service.active_faults.change(FaultPlan(faults=["submit:slow"], slow=20.0))
    batch = Batch(service, tmp_path, FLUX_KONTEXT_STOP_TIMEOUT="0.2")
    batch.write(lines(50))
    running = batch.start_run()
    batch.until(lambda: service.active_faults.numbers["submit"] >= 8, running)
    running.send(signal.SIGTERM)
    assert not running.lives_for(15)
    ended = running.end()
    assert ended.status == 143, ended
    assert "8 submits had no reply within 0.2 seconds" in ended.said


def test_resumed_process_pays_nothing_after_another_run(service, tmp_path):
    batch = Batch(service, tmp_path)
    batch.write(lines(20))
    sleeper = batch.start_run()
    batch.until(lambda: batch.accepted >= 5, sleeper)
    sleeper.send(signal.SIGSTOP)
    other = batch.start_run()
    batch.until(lambda: len(list(Path(batch.output).iterdir())) > 10, other, seconds=60)
    sleeper.send(signal.SIGCONT)
    assert [sleeper.end().status, other.end().status] == [0, 0]
    assert batch.accepted == 20
    assert assert_no_problems(batch).stored == 20


@pytest.mark.parametrize("refusal", ["unauthorized", "no-balance"])
def test_refused_account_stops_the_batch(service, tmp_path, refusal):
    service.active_faults.change(FaultPlan(faults=[f"submit:{refusal}@20-"]))
    batch = Batch(service, tmp_path)
    batch.write(lines(60))
    stopped = batch.run()
    assert stopped.status == 1
    assert stopped.said.count("flux-kontext: ") == 1
    assert batch.accepted == 19
    assert service.active_faults.numbers["submit"] < 20 + 8
    service.active_faults.change(FaultPlan())
    assert batch.run().status == 0
    assert batch.accepted == 60
    assert_no_problems(batch)


def test_full_disk_pays_for_nothing_unrecorded(tmp_path):
    with running_sandbox(SandboxSettings(mean=0.3, long_edge=256)) as service:
        batch = Batch(service, tmp_path)
        batch.write(lines(8))
        full = batch.run(file_limit=120)  # enough for a heartbeat, too little for an intent
        assert batch.accepted == 0, full
        assert full.status != 0
        images = batch.run(file_limit=1_500)  # enough for records, too little for images
        assert "cannot be written:" in images.said, images
        assert batch.accepted == 8
        found = batch.check(killed=False, complete=False)
        assert not found.problems, found
        assert batch.run().status == 0
        assert batch.accepted == 8
        assert assert_no_problems(batch).stored == 8


@pytest.mark.parametrize("output", ["relative", "with spaces/and more/", "ünïcode#?%20"])
def test_output_may_have_any_name(service, tmp_path, output):
    place = tmp_path / "place"
    place.mkdir()
    given = os.path.relpath(place / output) if output == "relative" else f"{place}/{output}"
    batch = Batch(service, tmp_path, output=given)
    batch.write(lines(6))
    batch.run(kill_point=("image", "before", 3))
    assert batch.run().status == 0
    batch.output = str(place / output)
    assert batch.accepted == 6
    assert assert_no_problems(batch).stored == 6


def test_batch_killed_on_s3_is_finished_by_a_rerun(service, tmp_path):
    with s3_server() as (bucket, client):
        access = {
            "FSSPEC_S3_ENDPOINT_URL": client.meta.endpoint_url,
            "FSSPEC_S3_KEY": "testing",
            "FSSPEC_S3_SECRET": "testing",
        }
        for number, kill_point in enumerate(
            [
                ("create", "after", 3),
                ("request", "after", 4),
            ]
        ):
            folder = tmp_path / f"{number}"
            folder.mkdir()
            output = f"{bucket}/batch {number}/"
            batch = Batch(service, folder, output=output, **access)
            batch.write(lines(4, start=1000 * number))
            batch.run(kill_point=kill_point)
            batch.run()
            found = batch.check()
            assert not found.problems, (kill_point, str(found))
            assert found.stored + found.unknown == 4
