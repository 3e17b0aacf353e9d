"""Whole batches in virtual time: a seed decides what fails, who dies and when.

Everything is real but the clock, the wire and the disk: the batch, the ledger and the sandbox
share one event loop whose time jumps. A process that dies takes no further effect on anything,
at whatever instruction it was; what it had handed to the wire or the disk may still arrive.
"""

import asyncio
import contextlib
import contextvars
import functools
import itertools
import json
import random
import ssl
import types
from collections import Counter
from dataclasses import dataclass, field

import fsspec
import httpx

from prefect_flux_kontext import atomic
from prefect_flux_kontext.api.cadence import PollingCadence
from prefect_flux_kontext.api.client import FluxKontextClient
from prefect_flux_kontext.api.governor import Governor
from prefect_flux_kontext.batch import session as session_module
from prefect_flux_kontext.batch import waves
from prefect_flux_kontext.batch.batch import collect, run_batch
from prefect_flux_kontext.batch.options import RowOptions
from prefect_flux_kontext.batch.policy import FailurePolicy
from prefect_flux_kontext.batch.session import batch_session
from prefect_flux_kontext.ledger import ledger as ledger_module
from prefect_flux_kontext.ledger import owners
from prefect_flux_kontext.manifest.rows import make_row
from prefect_flux_kontext.sandbox.app import Sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from prefect_flux_kontext.settings import FluxKontextSettings
from prefect_flux_kontext.storage import OutputFolder
from tests.chaos.checker import check
from tests.support.virtual_time import VirtualTimeLoop

CANARY = "canary-7f3a9c51e2d84b06"
_SETTINGS = FluxKontextSettings(concurrent_submits=3, gallery_images=0)
_trust = functools.cache(ssl.create_default_context)
_process = contextvars.ContextVar("process", default=None)
_numbers = itertools.count()


class Killed(BaseException):
    """The process is no more; whatever it still tries has no effect."""


@dataclass
class Faults:
    """Shares of requests and of ledger calls that go wrong, by what goes wrong."""

    wire: dict[str, float] = field(default_factory=dict)
    disk: dict[str, float] = field(default_factory=dict)


WIRE = (
    "lost_reply",
    "trouble_after",
    "trouble_before",
    "unconnected",
    "limited",
    "limited_in_200",
    "status_trouble",
    "download_trouble",
)
DISK = ("refused", "written_but_unanswered")


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
    """Virtual time, in which threads are callbacks that come a little later."""

    world = None

    def run_in_executor(self, executor, func, *args):
        return self.world.call(self, func, args)


@dataclass
class Process:
    """A run of the batch, alive or not."""

    number: int
    alive: bool = True
    tasks: list = field(default_factory=list)


class _Task(asyncio.Task):
    """A task whose place in a set is by number, not by address: else no seed repeats itself."""

    def __init__(self, work, **how):
        self.number = next(_numbers)
        super().__init__(work, **how)

    def __hash__(self):
        return self.number

    def __eq__(self, other):
        return self is other


def _task(loop, work, context=None, **how):
    """Tasks belong to the process that has started them, so that they die with it."""
    task = _Task(work, loop=loop, context=context, **how)
    process = (context or contextvars.copy_context()).get(_process)
    if process is not None:
        process.tasks.append(task)
    return task


class World:
    """The service, the disk, and the processes of one simulation."""

    sandbox = None

    def __init__(self, seed, faults, *, hook=None):
        self.dice = random.Random(seed)
        self.faults = faults
        self.hook = hook
        self.processes = {}
        self.posts = 0
        self.log = []
        self.numbers = Counter()
        self.url = f"memory://simulation-{next(_numbers)}"

    def call(self, loop, func, args):
        """A call in a thread: its effect comes later, and its result later still."""
        process, answer = _process.get(), loop.create_future()

        def effect():
            if process is not None and not process.alive:
                return  # died before
            fault = self._disk_fault(func) if process is not None else None
            outcome = error = None
            try:
                if fault != "refused":
                    outcome = func(*args)
            except Exception as raised:  # noqa: BLE001 - it is handed to who waits
                error = raised
            if fault is not None:
                error = OSError(5, "the disk says no")
            loop.call_later(self.dice.uniform(0, 0.05), finish, outcome, error)

        def finish(outcome, error):
            if answer.done() or (process is not None and not process.alive):
                return
            if error is None:
                answer.set_result(outcome)
            elif isinstance(error, StopIteration):
                answer.set_exception(RuntimeError("StopIteration"))
            else:
                answer.set_exception(error)

        loop.call_later(self.dice.uniform(0, 0.05), effect)
        return answer

    def _disk_fault(self, func):
        if "RecordStore" not in getattr(func, "__qualname__", ""):
            return None
        self.numbers["disk"] += 1
        if self.hook is not None and (fault := self.hook("disk", func, self.numbers["disk"])):
            return fault
        return self._throw(self.faults.disk)

    def _throw(self, rates):
        number = self.dice.random()
        for fault, rate in rates.items():
            number -= rate
            if number < 0:
                return fault
        return None

    def wire_fault(self, kind, request):
        self.numbers[kind] += 1
        if self.hook is not None and (fault := self.hook(kind, request, self.numbers[kind])):
            return fault
        names = {"submit": WIRE[:6], "status": WIRE[6:7], "download": WIRE[7:]}.get(kind, ())
        rates = {name: self.faults.wire.get(name, 0.0) for name in names}
        return self._throw(rates)


class Wire(httpx.AsyncBaseTransport):
    """The sandbox, reached over a network that loses things."""

    def __init__(self, world):
        self._world = world
        self._app = httpx.ASGITransport(app=world.sandbox.app)

    async def handle_async_request(self, request):
        world, process = self._world, _process.get()
        path = request.url.path
        kind = {"generateTask": "submit", "statusTask": "status"}.get(path.split("/")[-2], "other")
        kind = "download" if path.startswith("/results/") else kind
        _check_alive(process)
        fault = world.wire_fault(kind, request)
        await asyncio.sleep(world.dice.uniform(0, 0.1))
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
            world.posts += 1
            world.log.append(("submit", json.loads(request.content)["input"]["prompt"]))
        response = await self._app.handle_async_request(request)
        content = await response.aread()
        await asyncio.sleep(world.dice.uniform(0, 0.1))
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


@contextlib.contextmanager
def simulated(world):
    """Put the world's clock, dice and processes where the package looks for them."""
    patched = []

    def put(module, name, value):
        patched.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    def hexes(number):
        return f"{world.dice.getrandbits(8 * number):0{2 * number}x}"

    chance = types.SimpleNamespace(token_hex=hexes, token_urlsafe=hexes)
    put(ssl, "create_default_context", _trust)  # it takes 90 ms, and nothing here speaks TLS
    for module in (owners, ledger_module, atomic):
        put(module, "secrets", chance)
    put(owners, "os", types.SimpleNamespace(getpid=lambda: _process.get().number))
    put(owners, "_process_started", world_started(world))
    put(waves, "WAVE_ROWS", 4)
    put(
        session_module,
        "download_client",
        lambda **_: httpx.AsyncClient(transport=Wire(world), timeout=30, verify=False),
    )
    before = random.getstate()
    random.seed(world.dice.random())
    try:
        yield
    finally:
        random.setstate(before)
        for module, name, value in reversed(patched):
            setattr(module, name, value)
        fs = fsspec.filesystem("memory")
        with contextlib.suppress(FileNotFoundError):
            fs.rm(world.url.removeprefix("memory:/"), recursive=True)


def world_started(world):
    def started(pid):
        process = world.processes.get(pid)
        return "running" if process is None or process.alive else None

    return started


async def run(
    world,
    rows,
    *,
    only_collect=False,
    resubmit=False,
    retry=False,
    policy=None,
    deferred=False,
    slots=6,
):
    """One run of the batch, in the process of the present context."""
    governor = Governor(requests_per_minute=60_000, concurrent_tasks=slots)
    client = FluxKontextClient(
        CANARY, base_url="http://sandbox.test", transport=Wire(world), governor=governor
    )
    options = RowOptions(
        cadence=PollingCadence(initial_delay=1, interval=1, timeout=600),
        policy=policy or FailurePolicy(),
        resubmit_unknown=resubmit,
        retry_failed=retry,
        deferred=deferred,
    )
    async with batch_session(client, OutputFolder(world.url), options, _SETTINGS) as session:
        if only_collect:
            return await collect(session, lambda wave: wave.run(), concurrent_tasks=slots)
        return await run_batch(session, rows, lambda wave: wave.run(), concurrent_tasks=slots)


async def in_process(world, lives, *args, stops=False, **how):
    """Run in a process of its own, which is killed, or told to stop, after so many seconds.

    Returns:
        The summary, or what was raised, or None for one that was killed.
    """
    process = Process(len(world.processes) + 1)
    world.processes[process.number] = process
    loop = asyncio.get_running_loop()
    context = contextvars.copy_context()
    context.run(_process.set, process)
    task = loop.create_task(run(world, *args, **how), context=context)
    done, _ = await asyncio.wait({task}, timeout=lives)
    if not done and stops:
        task.cancel()
        await asyncio.wait({task})
        done = {task}
    process.alive = False
    while left := [pending for pending in process.tasks if not pending.done()]:
        for pending in left:
            pending.cancel()
        await asyncio.sleep(0)
    if not done or task.cancelled():
        return None
    return task.exception() or task.result()


def manifest(lines):
    """Rows of (id, prompt)."""
    return [make_row(n, {"id": i, "prompt": p}) for n, (i, p) in enumerate(lines, start=2)]


def simulate(main, seed, faults=None, settings=None, *, hook=None):
    """Run `main(world)` on virtual time and return what it returns."""
    settings = settings or SandboxSettings(mean=3, long_edge=16, seed=0)
    world = World(seed, faults or Faults(), hook=hook)
    loop = SimLoop()
    loop.set_task_factory(_task)
    SimLoop.world = world
    with simulated(world), asyncio.Runner(loop_factory=lambda: loop) as runner:
        world.sandbox = Sandbox(settings)
        return runner.run(main(world))


async def served(world, task_ids):
    """What the service serves for each task, asked outside of any process."""
    pictures = {}
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app=world.sandbox.app), verify=False
    ) as http:
        for task_id in task_ids:
            for kind in ("jpg", "png"):
                reply = await http.get(f"http://sandbox.test/results/{task_id}/1.{kind}")
                if reply.status_code == 200:
                    pictures[task_id] = reply.content
    return pictures


async def checked(world, lines, **how):
    """Check the invariants as the world stands."""
    records = list(world.sandbox.service.records())
    pictures = await served(world, [record["taskId"] for record in records])
    return check(
        lines, records, world.url, lambda task, _kind: pictures.get(task), canary=CANARY, **how
    )
