"""Whole batches in callback mode on virtual time, whose callbacks a test delivers.

The batch, the receiver and the sandbox are real and share one loop. Receiver and batch share only
the inbox, as two processes would.
"""

import asyncio
import itertools
import json
from dataclasses import dataclass, field

import httpx

from prefect_flux_kontext.batch import session as session_module
from prefect_flux_kontext.batch.collection import collect_outstanding
from prefect_flux_kontext.batch.policy import RowOptions
from prefect_flux_kontext.batch.runner import run_batch
from prefect_flux_kontext.batch.session import open_session
from prefect_flux_kontext.callbacks.options import CallbackOptions
from prefect_flux_kontext.callbacks.receiver import create_receiver
from prefect_flux_kontext.client.client import FluxKontextClient
from prefect_flux_kontext.client.limits.account import AccountLimiter
from prefect_flux_kontext.client.polling import PollingCadence
from prefect_flux_kontext.manifest.row import make_row
from prefect_flux_kontext.sandbox.app import Sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from prefect_flux_kontext.settings import FluxKontextSettings
from prefect_flux_kontext.storage.filesystem import OutputFolder

KEY = "canary-7f3a9c51e2d84b06"
SECRET = "a-secret-of-the-tests-0123456789"
PUBLIC = "http://127.0.0.1/behind/a/prefix"
_numbers = itertools.count()


@dataclass
class CalledBatch:
    """A sandbox, an output, a receiver, and the faults between them.

    Attributes:
        deliver_callback: `async def deliver(post, url, envelope)`: delivers a callback by
            `await post(url, body)`, or drops it.
        lose: Whether the reply to the n-th submit, from 1, is lost after it was accepted.
    """

    monkeypatch: object
    deliver_callback: object = None
    lose: object = lambda _number: False
    slots: int = 1_000
    submits: int = 0
    lost_tasks: list[str] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.url = f"memory://called-{next(_numbers)}"
        self.sandbox = Sandbox(SandboxSettings(long_edge=16))
        self.sandbox._lifecycle._callback_sender = self
        self.service = self.sandbox.service
        self._app = httpx.ASGITransport(app=self.sandbox.app)
        self.receiver = create_receiver(f"{self.url}/_ledger/callbacks", SECRET)
        self._reach = httpx.AsyncClient(
            transport=httpx.ASGITransport(app=self.receiver), verify=False
        )
        self.monkeypatch.setattr(
            session_module,
            "open_download_client",
            lambda **_: httpx.AsyncClient(transport=self._app, verify=False),
        )

    async def deliver(self, url, envelope):
        """Deliver a callback; the sandbox calls it when a task has ended."""
        self.urls.append(url)
        await (self.deliver_callback or punctual)(self.post, url, envelope)
        return True

    async def post(self, url, body):
        """Post one callback over ASGI."""
        how = {"content": body} if isinstance(body, bytes) else {"json": body}
        return await self._reach.post(url, **how)

    async def handle_async_request(self, request):
        """Answer a request as the service, as an httpx transport that loses replies."""
        response = await self._app.handle_async_request(request)
        content = await response.aread()
        if "generateTask" in request.url.path:
            self.submits += 1
            if self.lose(self.submits):
                self.lost_tasks.append(json.loads(content)["data"]["taskId"])
                raise httpx.ReadError("reset")
        stream = httpx.ByteStream(content)
        return httpx.Response(response.status_code, headers=response.headers, stream=stream)

    async def aclose(self):
        """Part of httpx's interface."""

    async def run(self, rows=20, *, only_collect=False, url=PUBLIC, resubmit=False, **decided):
        """Run the batch once, as a process would."""
        limiter = AccountLimiter(requests_per_minute=60_000, concurrent_tasks=self.slots)
        client = FluxKontextClient(
            KEY, base_url="http://sandbox.test", transport=self, limiter=limiter
        )
        cadence = PollingCadence(initial_delay=20, interval=3, timeout=900)
        options = RowOptions(cadence=cadence, resubmit_unknown=resubmit)
        callbacks = CallbackOptions(url=url, secret=SECRET, **decided)
        output = OutputFolder(self.url)
        async with open_session(
            client, output, options, FluxKontextSettings(), callbacks
        ) as session:
            if only_collect:
                return await collect_outstanding(
                    session, lambda wave: wave.run(), concurrent_tasks=1_000
                )
            return await run_batch(
                session, manifest(rows), lambda wave: wave.run(), concurrent_tasks=1_000
            )

    async def inbox(self):
        """List the files in the inbox."""
        from prefect_flux_kontext.ledger.store import RecordStore  # noqa: PLC0415

        store = RecordStore(f"{self.url}/_ledger/callbacks")
        owners = await store.list_names("")
        return [name for owner in owners for name in await store.list_names(owner)]


def manifest(rows):
    return [make_row(n + 2, {"id": f"r{n}", "prompt": f"row number {n}"}) for n in range(rows)]


async def punctual(post, url, envelope):
    await post(url, envelope)


async def lost(_post, _url, _envelope):
    """Deliver nothing."""


async def later(post, url, body, seconds):
    await asyncio.sleep(seconds)
    await post(url, body)
