"""`kill -9` of a batch in callback mode, at random moments, while replies to submits are lost.

Without callbacks each lost reply and each kill leaves rows unknown. With them, what was paid for
is found again, and only rows that were never accepted stay unknown.
"""

import random

import pytest

from prefect_flux_kontext.sandbox.faults.plan import FaultPlan
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from tests.chaos.callback_batches import Receiver, held_port
from tests.chaos.processes import Batch

ROWS = [(f"row-{n}", f"lighthouse number {n}") for n in range(150)]
LOST = ["submit:lost-reply=0.05", "submit:trouble-after=0.05", "submit:unavailable=0.02"]


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_batch_recovers_its_tasks_by_callbacks(seed, tmp_path):
    rng = random.Random(seed)
    settings = SandboxSettings(mean=0.5, long_edge=16, callback_delay_scale=0.02)
    with running_sandbox(settings) as service, held_port() as port:
        service.active_faults.change(FaultPlan(seed=seed, faults=LOST))
        batch = Batch(
            service,
            tmp_path,
            FLUX_KONTEXT_CALLBACK_URL=f"http://127.0.0.1:{port}/hooks",
            FLUX_KONTEXT_CALLBACK_SECRET="canary-7f3a9c51e2d84b06-secret",
            FLUX_KONTEXT_CALLBACK_SWEEP="1",
            FLUX_KONTEXT_CALLBACK_GRACE="2",
        )
        batch.write(ROWS)
        receiver = Receiver(batch, port)
        for _ in range(6):
            batch.run_and_kill(rng.uniform(0.3, 1.5))
        batch.run()
        # On a busy machine a callback may arrive after the run has ended; it still counts.
        batch.until(lambda: every_callback_ended(service), receiver.process)
        collected = batch.command("collect")
        receiver.kill()
        found = batch.check()
        assert not found.problems, found
        assert batch.kills
        applied = service.active_faults.applied
        assert applied["submit:lost-reply"] + applied["submit:trouble-after"] > 3
        assert found.stored == batch.accepted, collected.said


def every_callback_ended(service):
    bill = service.service.bill()
    return sum(bill["callbacks"].values()) == bill["accepted"]
