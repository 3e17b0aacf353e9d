"""Batches that are called back, while callbacks and submits go wrong and processes are killed."""

import re
from contextlib import contextmanager

from prefect_flux_kontext.sandbox.faults.registry import FAULTS
from tests.chaos.processes import KEY
from tests.chaos.trials import finish, tell
from tests.chaos.troubles import ALL, STOPPING, shares

_LATE = 3
_LOST_REPLIES = ("submit:lost-reply=0.02", "submit:trouble-after=0.02", "submit:unavailable=0.01")
_CALLED = {
    "FLUX_KONTEXT_CALLBACK_SECRET": f"{KEY}-secret",
    "FLUX_KONTEXT_CALLBACK_SWEEP": "2",
    "FLUX_KONTEXT_CALLBACK_GRACE": "3",
}


@contextmanager
def called_batch(place, rows):
    """A batch and a receiver of its callbacks, a process of its own that can be killed."""
    batch = place.batch(rows, **_CALLED)
    receiver = Receiver(batch)
    batch.environment["FLUX_KONTEXT_CALLBACK_URL"] = f"http://127.0.0.1:{receiver.port}/hooks"
    try:
        yield batch, receiver
    finally:
        receiver.kill()


class Receiver:
    """`flux-kontext receive` on a port that stays the same when it is started again."""

    def __init__(self, batch):
        self._batch = batch
        self.port = 0
        self.start()

    def start(self):
        batch = self._batch
        self._process = batch.start("receive", batch.output, "--port", self.port)
        batch.until(lambda: "Callbacks are received" in self._process.said(), self._process, 60)
        self.port = int(re.search(r"received on http://[^ ]*:(\d+)", self._process.said())[1])

    def kill(self):
        self._process.kill()


def each_callback_fault(place, line, dice, scale, *, rows=500):
    """A batch under each fault of callbacks alone, killed once, while some replies are lost."""
    for name in FAULTS["callback"]:
        fault = f"callback:{name}"
        with called_batch(place, round(rows * scale)) as (batch, _):
            place.weather(dice, [f"{fault}=0.5", *_LOST_REPLIES], late=_LATE)
            batch.run_and_kill(dice.uniform(0.3, 6))
            befallen = place.service.weather.befallen
            finish(line, batch, 1)
        tell(f"    {fault} befell {befallen[fault]}; so far {line}")


def all_callback_faults(place, line, dice, scale, *, batches=4, rows=500):
    """Batches under all faults of everything at once; runs and receivers are killed at random."""
    faults = shares([fault for fault in ALL if fault not in STOPPING], 0.004)
    faults += [f"callback:{name}=0.1" for name in FAULTS["callback"]]
    for number in range(batches):
        with called_batch(place, round(rows * scale)) as (batch, receiver):
            place.weather(dice, faults, late=_LATE)
            for _ in range(8):
                batch.run_and_kill(dice.uniform(0.3, 3))
                if dice.random() < 0.5:
                    receiver.kill()
                    batch.kills += 1
                    receiver.start()
            finish(line, batch, 8)
        tell(f"    batch {number + 1}: {batch.kills} kills; so far {line}")
