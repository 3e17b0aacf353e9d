"""The service in memory and in virtual time, with exact limits and a slow connection.

The client is the real one; only its connections are replaced.
"""

import asyncio
import json
import random
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from types import SimpleNamespace

from prefect_flux_kontext.client import retry
from prefect_flux_kontext.client.client import FluxKontextClient
from prefect_flux_kontext.client.limits import poll_scheduler
from prefect_flux_kontext.client.limits.account import AccountLimiter
from prefect_flux_kontext.sandbox.contract import Refusal, failure, success
from prefect_flux_kontext.sandbox.service import Service
from prefect_flux_kontext.sandbox.settings import SandboxSettings

URL = "http://service.test"
KEY = "simulated"


@contextmanager
def repeatable_simulation():
    """Make simulations repeatable: seed the backoff and stop the calendar.

    Each task is waited for from its submit on, so its age is 0 by the calendar.
    """
    original = retry.random, poll_scheduler.utc_now
    retry.random = random.Random(1)
    poll_scheduler.utc_now = lambda: datetime.min.replace(tzinfo=UTC)
    try:
        yield
    finally:
        retry.random, poll_scheduler.utc_now = original


class SimulatedAccount:
    """An account of the sandbox's service, reached over a slow connection.

    Args:
        curve: `curve(seconds since the first request, rng)` returns the seconds of a generation.
            None: the sandbox's own latency model.
        line: Shortest and longest seconds of the way to the service, and of the way back.
        refuse: Share of requests rejected with 429 at random, whatever the limits are.
        seed: Seed of the connection and the service.
        settings: Settings of the sandbox.
    """

    def __init__(self, *, curve=None, line=(0.05, 0.25), refuse=0.0, seed=0, **settings):
        self.settings = SandboxSettings(**{"balance": 1_000_000, "seed": seed, **settings})
        self.service = Service(self.settings)
        self.rng = random.Random(seed + 1)
        self.line = line
        self.refuse = refuse
        self.refused_at_random = 0
        self.first_request = None
        if curve is not None:
            self.service._curve = SimpleNamespace(draw=lambda rng: curve(self.since(), rng))

    def since(self):
        """Return the seconds since the first request."""
        return asyncio.get_running_loop().time() - self.first_request

    def client(self, *, requests=10_000, tasks=1_000):
        """Create a client of this account, with a limiter of its own."""
        limiter = AccountLimiter(requests_per_minute=requests, concurrent_tasks=tasks)
        client = FluxKontextClient(KEY, base_url=URL, limiter=limiter)
        client._connections = self
        return client

    @property
    def tasks(self):
        """The accepted tasks, in order."""
        return list(self.service._tasks.values())

    async def aclose(self):
        """Do nothing: there are no connections."""

    def check_open(self):
        """Do nothing: there are no connections."""

    @asynccontextmanager
    async def stream(self, method, url, *, json=None):
        """Yield the service's reply, after the time for both ways."""
        if self.first_request is None:
            self.first_request = asyncio.get_running_loop().time()
        await asyncio.sleep(self.rng.uniform(*self.line))
        reply = self._reply(method, url, json)
        await asyncio.sleep(self.rng.uniform(*self.line))
        yield reply

    def _reject_at_random(self):
        if self.rng.random() < self.refuse:
            self.refused_at_random += 1
            raise Refusal(429, "too many requests", "at random")

    def _reply(self, method, url, payload):
        try:
            self._reject_at_random()
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


class CallbackPauses:
    """The pauses of a wait for a task whose callback arrives after the time for one way."""

    def __init__(self, account, task_id):
        self._account = account
        self._ends = account.service._tasks[task_id].ready_at

    async def before_first_poll(self, _age):
        left = self._ends - asyncio.get_running_loop().time()
        await asyncio.sleep(max(0.0, left) + self._account.rng.uniform(*self._account.line))

    async def before_next_poll(self):
        await self.before_first_poll(0.0)


class _Reply:
    def __init__(self, status_code, headers, envelope):
        self.status_code = status_code
        self.headers = headers
        self._envelope = envelope

    @property
    async def stream(self):
        yield json.dumps(self._envelope).encode()
