import asyncio
import json
from itertools import pairwise

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from prefect_flux_kontext.sandbox.lifecycle import CallbackSender
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from tests.sandbox.helpers import KEY, SUBMIT, sandbox_client

pytestmark = pytest.mark.anyio


class Receiver:
    """A receiver of callbacks that answers with the given statuses, or hangs on None."""

    def __init__(self, *answers):
        self._answers = list(answers)
        self.calls = []
        self.app = Starlette(routes=[Route("/{token}", self._take, methods=["POST"])])

    async def _take(self, request):
        now = asyncio.get_running_loop().time()
        self.calls.append((now, request.path_params["token"], await request.json()))
        answer = self._answers.pop(0) if self._answers else 200
        if answer is None:
            await asyncio.sleep(3_600)
        return Response(status_code=answer or 200)

    def sender(self, timeout=30):
        sender = CallbackSender(timeout, 1)
        sender._client = httpx.AsyncClient(transport=httpx.ASGITransport(app=self.app))
        return sender


def callback(url):
    return {"request_type": "callback", "callback_url": url}


async def through(receiver, sandbox, prompt="a cat"):
    """A task in callback mode, whose callbacks reach the receiver in process."""
    sandbox.sandbox._lifecycle._callback_sender = receiver.sender()
    return await sandbox.accepted(prompt, top=callback("http://receiver.test/secret"))


@pytest.mark.virtual_time
async def test_the_callback_is_the_status_envelope_of_the_ended_task():
    receiver = Receiver()
    async with sandbox_client(mean=30, spread=0) as sandbox:
        task_id = await through(receiver, sandbox)
        start = asyncio.get_running_loop().time()
        await sandbox.background()
        ((at, token, envelope),) = receiver.calls
        assert token == "secret"
        assert envelope == {
            "code": 200,
            "message": "success",
            "data": await sandbox.data(task_id),
        }
        assert envelope["data"]["state"] == "success"
        assert 30 <= at - start < 31
        assert (await sandbox.bill())["callbacks"] == {"delivered": 1, "failed": 0}


@pytest.mark.virtual_time
async def test_a_failed_task_is_called_back_too():
    receiver = Receiver()
    async with sandbox_client() as sandbox:
        await through(receiver, sandbox, "nsfw")
        await sandbox.background()
        ((_, _, envelope),) = receiver.calls
        assert (envelope["code"], envelope["data"]["state"]) == (200, "failed")


@pytest.mark.virtual_time
@pytest.mark.parametrize("bad", [500, 404, 201, 302])
async def test_callback_is_repeated_with_growing_delays_until_200(bad):
    receiver = Receiver(bad, bad, bad)
    async with sandbox_client() as sandbox:
        await through(receiver, sandbox)
        await sandbox.background()
        times = [at for at, _, _ in receiver.calls]
        pauses = [later - earlier for earlier, later in pairwise(times)]
        assert pauses == [pytest.approx(5), pytest.approx(15), pytest.approx(60)]
        assert len({json.dumps(envelope) for _, _, envelope in receiver.calls}) == 1
        assert (await sandbox.bill())["callbacks"] == {"delivered": 1, "failed": 0}


@pytest.mark.virtual_time
async def test_after_three_redeliveries_it_is_given_up():
    receiver = Receiver(*[500] * 9)
    async with sandbox_client() as sandbox:
        await through(receiver, sandbox)
        await sandbox.background()
        assert len(receiver.calls) == 4
        assert (await sandbox.bill())["callbacks"] == {"delivered": 0, "failed": 1}


@pytest.mark.virtual_time
async def test_a_receiver_has_thirty_seconds_to_answer():
    receiver = Receiver(None)
    async with sandbox_client() as sandbox:
        await through(receiver, sandbox)
        await sandbox.background()
        (first, _, _), (second, _, _) = receiver.calls
        assert second - first == pytest.approx(35)


async def test_callback_over_http_is_repeated_until_accepted():
    calls, last = [], asyncio.Event()

    async def take(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        calls.append(json.loads(await reader.readexactly(length)))
        status = "503 Busy" if len(calls) == 1 else "200 OK"
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode())
        await writer.drain()
        writer.close()
        if len(calls) == 2:
            last.set()

    receiver = await asyncio.start_server(take, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{receiver.sockets[0].getsockname()[1]}/token"
    settings = SandboxSettings(mean=0, callback_delay_scale=0)
    async with receiver, httpx.AsyncClient(headers=KEY) as client:
        with running_sandbox(settings) as sandbox:
            body = {**callback(url), "input": {"mode": "pro", "prompt": "a cat"}}
            reply = await client.post(sandbox.url + SUBMIT, json=body)
            async with asyncio.timeout(10):
                await last.wait()
    assert calls[0] == calls[1]
    assert calls[0]["data"]["taskId"] == reply.json()["data"]["taskId"]
