"""The service in memory and in virtual time: its own limits, counted exactly, and a slow line.

The client's code is the real one down to `exchange`; only the socket is not there.
"""

import asyncio
import json
import random
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from types import SimpleNamespace

from prefect_flux_kontext.client import retry as backoff
from prefect_flux_kontext.client.client import FluxKontextClient
from prefect_flux_kontext.client.limits import poll_scheduler as looks
from prefect_flux_kontext.client.limits.account import AccountLimiter
from prefect_flux_kontext.sandbox.contract import Refusal, failure, success
from prefect_flux_kontext.sandbox.service import Service
from prefect_flux_kontext.sandbox.settings import SandboxSettings

URL = "http://service.test"
KEY = "simulated"


@contextmanager
def the_same_each_time():
    """Neither the machine's pace nor anybody else's dice have a part in a simulation.

    Each task is waited for from its submit on, so it has no age that a real clock could tell.
    """
    dice, now = backoff.random, looks.utc_now
    backoff.random = random.Random(1)
    looks.utc_now = lambda: datetime.min.replace(tzinfo=UTC)
    try:
        yield
    finally:
        backoff.random, looks.utc_now = dice, now


class SimulatedAccount:
    """An account of the sandbox's service at the end of a line.

    Args:
        curve: `curve(seconds since the first request, dice)` gives the seconds of a generation;
            None for the sandbox's own curve.
        line: Shortest and longest seconds of a way to the service or back.
        refuse: Share of requests that are refused with 429 whatever the limits are.
        seed: Other dice for the line and the service.
        settings: The sandbox's.
    """

    def __init__(self, *, curve=None, line=(0.05, 0.25), refuse=0.0, seed=0, **settings):
        self.settings = SandboxSettings(**{"balance": 1_000_000, "seed": seed, **settings})
        self.service = Service(self.settings)
        self.dice = random.Random(seed + 1)
        self.line = line
        self.refuse = refuse
        self.refused_at_random = 0
        self.first_request = None
        if curve is not None:
            self.service._curve = SimpleNamespace(draw=lambda dice: curve(self.since(), dice))

    def since(self):
        """Seconds since the first request came."""
        return asyncio.get_running_loop().time() - self.first_request

    def client(self, *, requests=10_000, tasks=1_000):
        """A client of its own limiter that talks to this account."""
        limiter = AccountLimiter(requests_per_minute=requests, concurrent_tasks=tasks)
        client = FluxKontextClient(KEY, base_url=URL, limiter=limiter)
        client._connections = self
        return client

    @property
    def tasks(self):
        """The tasks that were accepted, in their order."""
        return list(self.service._tasks.values())

    async def aclose(self):
        """There is nothing to close."""

    @asynccontextmanager
    async def stream(self, method, url, *, json=None):
        """Answer as the service does, after the way there and before the way back."""
        if self.first_request is None:
            self.first_request = asyncio.get_running_loop().time()
        await asyncio.sleep(self.dice.uniform(*self.line))
        reply = self._reply(method, url, json)
        await asyncio.sleep(self.dice.uniform(*self.line))
        yield reply

    def _throw_dice(self):
        if self.dice.random() < self.refuse:
            self.refused_at_random += 1
            raise Refusal(429, "too many requests", "by the dice")

    def _reply(self, method, url, payload):
        try:
            self._throw_dice()
            if method == "POST":
                data = {"taskId": self.service.submit(KEY, payload, URL).task_id}
            else:
                task = self.service.status(KEY, url.partition("taskId=")[2])
                data = task.status(self.service.now(), self.service.epoch)
        except Refusal as refusal:
            headers = {}
            if refusal.retry_after is not None:
                headers["Retry-After"] = str(refusal.retry_after)
            return _Reply(refusal.code, headers, failure(refusal))
        return _Reply(200, {}, success(data))


class CalledBack:
    """The pauses of a wait for a task that is called back, a line's way after its end."""

    def __init__(self, account, task_id):
        self._account = account
        self._ends = account.service._tasks[task_id].ready_at

    async def before_first_look(self, _age):
        left = self._ends - asyncio.get_running_loop().time()
        await asyncio.sleep(max(0.0, left) + self._account.dice.uniform(*self._account.line))

    async def before_next_look(self):
        await self.before_first_look(0.0)


class _Reply:
    def __init__(self, status_code, headers, envelope):
        self.status_code = status_code
        self.headers = headers
        self._envelope = envelope

    @property
    async def stream(self):
        yield json.dumps(self._envelope).encode()
