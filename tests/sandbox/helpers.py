"""What the tests of the sandbox share: a client in process, bodies, and going through a task."""

import asyncio
import json
from contextlib import asynccontextmanager

import httpx

from prefect_flux_kontext.sandbox.app import Sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings

SUBMIT = "/api/v1/generateTask/flux-kontext"
STATUS = "/api/v1/statusTask/flux-kontext"
KEY = {"Authorization": "Bearer a-key"}
BASE = "http://sandbox.test"


@asynccontextmanager
async def sandbox_client(**settings):
    """A client of a sandbox in process; small pictures, unless asked otherwise."""
    sandbox = Sandbox(SandboxSettings(**{"long_edge": 64, **settings}))
    transport = httpx.ASGITransport(app=sandbox.app)
    async with httpx.AsyncClient(transport=transport, base_url=BASE, headers=KEY) as client:
        yield SandboxClient(client, sandbox)
        sandbox._lifecycle.stop()


class SandboxClient:
    """The wire, one line for each request."""

    def __init__(self, http, sandbox):
        self.http = http
        self.sandbox = sandbox

    async def submit(self, prompt="a cat in oil", *, key="a-key", top=None, **fields):
        body = {"input": {"mode": "pro", "prompt": prompt, **fields}, **(top or {})}
        return await self.http.post(SUBMIT, json=body, headers={"Authorization": f"Bearer {key}"})

    async def accepted(self, *args, **fields):
        reply = await self.submit(*args, **fields)
        assert reply.status_code == 200, reply.text
        return reply.json()["data"]["taskId"]

    async def status(self, task_id, key="a-key"):
        return await self.http.get(
            STATUS, params={"taskId": task_id}, headers={"Authorization": f"Bearer {key}"}
        )

    async def data(self, task_id):
        reply = await self.status(task_id)
        assert reply.status_code == 200, reply.text
        return reply.json()["data"]

    async def finished(self, task_id):
        """Asks every second of the loop's time until the task has ended."""
        while True:
            data = await self.data(task_id)
            if data["state"] in {"success", "failed"}:
                return data
            await asyncio.sleep(1)

    async def picture(self, task_id):
        data = await self.finished(task_id)
        return await self.http.get(result_url(data))

    async def bill(self):
        return (await self.http.get("/sandbox/bill")).json()

    async def tasks(self):
        lines = (await self.http.get("/sandbox/tasks")).text.splitlines()
        return [json.loads(line) for line in lines]

    async def background(self):
        """Waits for all that goes on behind the accepted tasks."""
        await asyncio.gather(*self.sandbox._lifecycle._jobs)


def result_url(data):
    (url,) = json.loads(data["resultJson"])["resultUrls"]
    return url
