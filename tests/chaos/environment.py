"""The environment of a simulation: processes, and a network and disk with faults by a seed.

A killed process has no further effect, at whatever instruction it was; what it had handed to the
network or the disk before may still arrive.
"""

import asyncio
import contextvars
import itertools
import json
import random
from collections import Counter
from dataclasses import dataclass, field

import httpx

from tests.support.virtual_time import VirtualTimeLoop

current_process = contextvars.ContextVar("process", default=None)
numbers = itertools.count()


class Killed(BaseException):
    """The process was killed; its further actions have no effect."""


@dataclass
class Faults:
    """Shares of requests and of ledger calls that fail, by fault."""

    network: dict[str, float] = field(default_factory=dict)
    disk: dict[str, float] = field(default_factory=dict)


NETWORK_FAULTS = (
    "lost_reply",
    "trouble_after",
    "trouble_before",
    "unconnected",
    "limited",
    "limited_in_200",
    "status_trouble",
    "download_trouble",
)
DISK_FAULTS = ("refused", "written_but_unanswered")


_REFUSALS = {
    "trouble_before": (503, {}, 503),
    "status_trouble": (503, {}, 503),
    "download_trouble": (503, {}, 503),
    "limited": (429, {"Retry-After": "1"}, 429),
    "limited_for_long": (429, {"Retry-After": "300"}, 429),
    "limited_in_200": (200, {}, 429),
    "unauthorized": (401, {}, 401),
    "no_balance": (402, {}, 402),
}


class SimLoop(VirtualTimeLoop):
    """An event loop on virtual time, whose threads are callbacks that run a little later."""

    env = None

    def run_in_executor(self, executor, func, *args):
        return self.env.call(self, func, args)


@dataclass
class Process:
    """A run of the batch, alive or not."""

    number: int
    alive: bool = True
    tasks: list = field(default_factory=list)


class _Task(asyncio.Task):
    """A task that hashes by number and not by address, so that a seed repeats itself."""

    def __init__(self, work, **how):
        self.number = next(numbers)
        super().__init__(work, **how)

    def __hash__(self):
        return self.number

    def __eq__(self, other):
        return self is other


def create_process_task(loop, work, context=None, **how):
    """Create a task that belongs to the current process, so that it dies with it."""
    task = _Task(work, loop=loop, context=context, **how)
    process = (context or contextvars.copy_context()).get(current_process)
    if process is not None:
        process.tasks.append(task)
    return task


class Environment:
    """The service, the disk, and the processes of one simulation."""

    sandbox = None

    def __init__(self, seed, faults, *, hook=None):
        self.rng = random.Random(seed)
        self.faults = faults
        self.hook = hook
        self.processes = {}
        self.posts = 0
        self.log = []
        self.numbers = Counter()
        self.url = f"memory://simulation-{next(numbers)}"

    def call(self, loop, func, args):
        """Simulate a call in a thread: its effect comes later, and its result later still."""
        process, answer = current_process.get(), loop.create_future()

        def effect():
            if process is not None and not process.alive:
                return  # died before
            fault = self._draw_disk_fault(func) if process is not None else None
            outcome = error = None
            try:
                if fault != "refused":
                    outcome = func(*args)
            except Exception as raised:  # noqa: BLE001 - it is raised in the waiting task
                error = raised
            if fault is not None:
                error = OSError(5, "the disk says no")
            loop.call_later(self.rng.uniform(0, 0.05), finish, outcome, error)

        def finish(outcome, error):
            if answer.done() or (process is not None and not process.alive):
                return
            if error is None:
                answer.set_result(outcome)
            elif isinstance(error, StopIteration):
                answer.set_exception(RuntimeError("StopIteration"))
            else:
                answer.set_exception(error)

        loop.call_later(self.rng.uniform(0, 0.05), effect)
        return answer

    def _draw_disk_fault(self, func):
        if "RecordStore" not in getattr(func, "__qualname__", ""):
            return None
        self.numbers["disk"] += 1
        if self.hook is not None and (fault := self.hook("disk", func, self.numbers["disk"])):
            return fault
        return self._draw_fault(self.faults.disk)

    def _draw_fault(self, rates):
        number = self.rng.random()
        for fault, rate in rates.items():
            number -= rate
            if number < 0:
                return fault
        return None

    def draw_network_fault(self, kind, request):
        self.numbers[kind] += 1
        if self.hook is not None and (fault := self.hook(kind, request, self.numbers[kind])):
            return fault
        names = {
            "submit": NETWORK_FAULTS[:6],
            "status": NETWORK_FAULTS[6:7],
            "download": NETWORK_FAULTS[7:],
        }.get(kind, ())
        rates = {name: self.faults.network.get(name, 0.0) for name in names}
        return self._draw_fault(rates)


class SimulatedTransport(httpx.AsyncBaseTransport):
    """The sandbox behind a network with faults."""

    def __init__(self, env):
        self._env = env
        self._app = httpx.ASGITransport(app=env.sandbox.app)

    async def handle_async_request(self, request):
        env, process = self._env, current_process.get()
        path = request.url.path
        kind = {"generateTask": "submit", "statusTask": "status"}.get(path.split("/")[-2], "other")
        kind = "download" if path.startswith("/results/") else kind
        _check_alive(process)
        fault = env.draw_network_fault(kind, request)
        await asyncio.sleep(env.rng.uniform(0, 0.1))
        _check_alive(process)
        if fault == "stalled":
            await asyncio.Event().wait()
        if fault == "unconnected":
            raise httpx.ConnectError("refused")
        if fault in _REFUSALS:
            await asyncio.sleep(fault == "limited_for_long")
            status, headers, code = _REFUSALS[fault]
            envelope = {"code": code, "message": fault, "data": None}
            return httpx.Response(status, headers=headers, json=envelope)
        if kind == "submit":
            env.posts += 1
            env.log.append(("submit", json.loads(request.content)["input"]["prompt"]))
        response = await self._app.handle_async_request(request)
        content = await response.aread()
        await asyncio.sleep(env.rng.uniform(0, 0.1))
        _check_alive(process)
        if fault == "lost_reply":
            raise httpx.ReadError("reset")
        if fault == "trouble_after":
            return httpx.Response(502)
        stream = httpx.ByteStream(content)
        return httpx.Response(response.status_code, headers=response.headers, stream=stream)


def _check_alive(process):
    if process is not None and not process.alive:
        raise Killed
