"""Batches with callbacks, under faults of callbacks and submits, with killed processes."""

import socket
from contextlib import contextmanager

from prefect_flux_kontext.sandbox.faults.handlers import FAULTS
from tests.chaos.fault_sets import ALL, STOPPING, plan_fault_shares
from tests.chaos.processes import KEY
from tests.chaos.trials import finish

_LATE = 3
_LOST_REPLIES = ("submit:lost-reply=0.02", "submit:trouble-after=0.02", "submit:unavailable=0.01")
_CALLED = {
    "FLUX_KONTEXT_CALLBACK_SECRET": f"{KEY}-secret",
    "FLUX_KONTEXT_CALLBACK_SWEEP": "2",
    "FLUX_KONTEXT_CALLBACK_GRACE": "3",
}


@contextmanager
def held_port():
    """Reserve a port, also while no process listens on it, and yield its number."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


class Receiver:
    """`flux-kontext receive` for a batch, in a process that can be killed and started again."""

    def __init__(self, batch, port):
        self._batch = batch
        self._port = port
        self.start()

    def start(self):
        self.process = self._batch.start("receive", self._batch.output, "--port", self._port)
        self._batch.until(lambda: "Receiving callbacks" in self.process.said(), self.process, 300)

    def kill(self):
        self.process.kill()


@contextmanager
def called_batch(factory, rows):
    """Yield a batch and the running receiver of its callbacks."""
    with held_port() as port:
        url = f"http://127.0.0.1:{port}/hooks"
        batch = factory.create_batch(rows, **_CALLED, FLUX_KONTEXT_CALLBACK_URL=url)
        receiver = Receiver(batch, port)
        try:
            yield batch, receiver
        finally:
            receiver.kill()


def each_callback_fault(factory, line, rng, number, *, rows=250, kills=3):
    """Run a batch under a fault of callbacks, lose some replies, and kill it some times."""
    fault = f"callback:{list(FAULTS['callback'])[number]}"
    with called_batch(factory, rows) as (batch, _):
        factory.inject_faults(rng, [f"{fault}=0.5", *_LOST_REPLIES], late=_LATE)
        for _ in range(kills):
            batch.run_and_kill(rng.uniform(0.3, 3))
        finish(line, batch, kills)


def all_callback_faults(factory, line, rng, _number, *, rows=200, kills=8):
    """Run a batch under all faults at a time; kill runs and receivers at random."""
    faults = plan_fault_shares([fault for fault in ALL if fault not in STOPPING], 0.004)
    faults += [f"callback:{name}=0.1" for name in FAULTS["callback"]]
    with called_batch(factory, rows) as (batch, receiver):
        factory.inject_faults(rng, faults, late=_LATE)
        for _ in range(kills):
            batch.run_and_kill(rng.uniform(0.3, 3))
            if rng.random() < 0.5:
                receiver.kill()
                batch.kills += 1
                receiver.start()
        finish(line, batch, kills)
