"""Clients for tests, with a limiter of their own, and a transport that plays a script."""

import asyncio

import httpx

from prefect_flux_kontext.client.client import FluxKontextClient
from prefect_flux_kontext.client.limits.account import AccountLimiter
from prefect_flux_kontext.models import GenerationRequest

KEY = "canary-7f3a9c51e2d84b06"

REQUEST = GenerationRequest(prompt="a lighthouse at dusk")


def make_client(url="http://service.test", *, requests=10_000, tasks=1_000, read=5.0, **options):
    """Create a client with its own limiter and a read timeout of `read` seconds."""
    limiter = AccountLimiter(requests_per_minute=requests, concurrent_tasks=tasks)
    client = FluxKontextClient(KEY, base_url=url, limiter=limiter, **options)
    client._connections.timeout = httpx.Timeout(5.0, read=read)
    return client


class ScriptedTransport(httpx.AsyncBaseTransport):
    """Transport that answers from a list, then repeats its last entry, and records loop times.

    An entry is (status, envelope), a response, an exception to raise, or None to never answer.
    """

    def __init__(self, *script, takes=0.0):
        self.script = script
        self.takes = takes
        self.times = []
        self.requests = []

    async def handle_async_request(self, request):
        self.times.append(asyncio.get_running_loop().time())
        self.requests.append(request)
        entry = self.script[min(len(self.requests), len(self.script)) - 1]
        await asyncio.sleep(self.takes)
        if entry is None:
            await asyncio.Event().wait()
        if isinstance(entry, Exception):
            raise entry
        if isinstance(entry, httpx.Response):
            return httpx.Response(entry.status_code, headers=entry.headers, content=entry.content)
        status, body = entry
        return httpx.Response(status, json=body)


def ok(data):
    """Return a successful reply."""
    return (200, {"code": 200, "message": "success", "data": data})


ACCEPTED = ok({"taskId": "task_1"})
PROCESSING = ok({"taskId": "task_1", "state": "processing"})
SUCCESS = ok(
    {
        "taskId": "task_1",
        "state": "success",
        "resultJson": '{"resultUrls": ["http://service.test/1.jpg"]}',
    }
)


def rate_limited(retry_after=None):
    """Return a 429, with or without a Retry-After header."""
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    return httpx.Response(429, headers=headers, json={"code": 429, "message": "slow down"})
