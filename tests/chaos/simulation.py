"""Whole batches on virtual time: a seed decides what fails, and which process dies when.

Only the clock, the network and the disk are simulated. The batch, the ledger and the sandbox
share one event loop, whose time jumps.
"""

import asyncio
import contextlib
import contextvars
import functools
import random
import ssl
import types

import fsspec
import httpx

from prefect_flux_kontext.batch import session as session_module
from prefect_flux_kontext.batch import waves
from prefect_flux_kontext.batch.collection import collect_outstanding
from prefect_flux_kontext.batch.policy import FailurePolicy, RowOptions
from prefect_flux_kontext.batch.runner import run_batch
from prefect_flux_kontext.batch.session import open_session
from prefect_flux_kontext.client.client import FluxKontextClient
from prefect_flux_kontext.client.limits.account import AccountLimiter
from prefect_flux_kontext.client.polling import PollingCadence
from prefect_flux_kontext.ledger import heartbeat as owners
from prefect_flux_kontext.ledger import ledger as ledger_module
from prefect_flux_kontext.manifest.row import make_row
from prefect_flux_kontext.sandbox.app import Sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from prefect_flux_kontext.settings import FluxKontextSettings
from prefect_flux_kontext.storage import atomic
from prefect_flux_kontext.storage.filesystem import OutputFolder
from tests.chaos.checker import check
from tests.chaos.environment import (
    Environment,
    Faults,
    Process,
    SimLoop,
    SimulatedTransport,
    create_process_task,
    current_process,
)

CANARY = "canary-7f3a9c51e2d84b06"
_SETTINGS = FluxKontextSettings(concurrent_submits=3, gallery_images=0)
_trust = functools.cache(ssl.create_default_context)


@contextlib.contextmanager
def simulated(env):
    """Patch the package with the environment's random numbers, processes and transport."""
    patched = []

    def put(module, name, value):
        patched.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    def hexes(number):
        return f"{env.rng.getrandbits(8 * number):0{2 * number}x}"

    chance = types.SimpleNamespace(token_hex=hexes, token_urlsafe=hexes)
    put(ssl, "create_default_context", _trust)  # it takes 90 ms, and nothing here speaks TLS
    for module in (owners, ledger_module, atomic):
        put(module, "secrets", chance)
    put(owners, "os", types.SimpleNamespace(getpid=lambda: current_process.get().number))
    put(owners, "_read_process_start", make_process_start_reader(env))
    put(waves, "WAVE_ROWS", 4)
    put(
        session_module,
        "open_download_client",
        lambda **_: httpx.AsyncClient(transport=SimulatedTransport(env), timeout=30, verify=False),
    )
    before = random.getstate()
    random.seed(env.rng.random())
    try:
        yield
    finally:
        random.setstate(before)
        for module, name, value in reversed(patched):
            setattr(module, name, value)
        fs = fsspec.filesystem("memory")
        with contextlib.suppress(FileNotFoundError):
            fs.rm(env.url.removeprefix("memory:/"), recursive=True)


def make_process_start_reader(env):
    def started(pid):
        process = env.processes.get(pid)
        return "running" if process is None or process.alive else None

    return started


async def run(
    env,
    rows,
    *,
    only_collect=False,
    resubmit=False,
    retry=False,
    policy=None,
    deferred=False,
    slots=6,
):
    """Run the batch once, in the current process."""
    limiter = AccountLimiter(requests_per_minute=60_000, concurrent_tasks=slots)
    client = FluxKontextClient(
        CANARY,
        base_url="http://sandbox.test",
        transport=SimulatedTransport(env),
        limiter=limiter,
    )
    options = RowOptions(
        cadence=PollingCadence(initial_delay=1, interval=1, timeout=600),
        policy=policy or FailurePolicy(),
        resubmit_unknown=resubmit,
        retry_failed=retry,
        deferred=deferred,
    )
    async with open_session(client, OutputFolder(env.url), options, _SETTINGS) as session:
        if only_collect:
            return await collect_outstanding(
                session, lambda wave: wave.run(), concurrent_tasks=slots
            )
        return await run_batch(session, rows, lambda wave: wave.run(), concurrent_tasks=slots)


async def in_process(env, lives, *args, stops=False, **how):
    """Run in a new process, which is killed or stopped after some seconds.

    Returns:
        The summary, or the exception raised, or None if it was killed.
    """
    process = Process(len(env.processes) + 1)
    env.processes[process.number] = process
    loop = asyncio.get_running_loop()
    context = contextvars.copy_context()
    context.run(current_process.set, process)
    task = loop.create_task(run(env, *args, **how), context=context)
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
    """Make rows of (id, prompt)."""
    return [make_row(n, {"id": i, "prompt": p}) for n, (i, p) in enumerate(lines, start=2)]


def simulate(main, seed, faults=None, settings=None, *, hook=None):
    """Run `main(env)` on virtual time and return what it returns."""
    settings = settings or SandboxSettings(mean=3, long_edge=16, seed=0)
    env = Environment(seed, faults or Faults(), hook=hook)
    loop = SimLoop()
    loop.set_task_factory(create_process_task)
    SimLoop.env = env
    with simulated(env), asyncio.Runner(loop_factory=lambda: loop) as runner:
        env.sandbox = Sandbox(settings)
        return runner.run(main(env))


async def fetch_results(env, task_ids):
    """Fetch the result of each task, outside of any process."""
    pictures = {}
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app=env.sandbox.app), verify=False
    ) as http:
        for task_id in task_ids:
            for kind in ("jpg", "png"):
                reply = await http.get(f"http://sandbox.test/results/{task_id}/1.{kind}")
                if reply.status_code == 200:
                    pictures[task_id] = reply.content
    return pictures


async def check_environment(env, lines, **how):
    """Check the invariants in the environment's current state."""
    records = list(env.sandbox.service.records())
    pictures = await fetch_results(env, [record["taskId"] for record in records])
    return check(
        lines, records, env.url, lambda task, _kind: pictures.get(task), canary=CANARY, **how
    )
