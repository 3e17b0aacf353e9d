"""The receiver on real sockets: slow clients, load, kill -9, and a batch's own receiver."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys

import httpx
import pytest

from prefect_flux_kontext.batch.policy import RowOptions
from prefect_flux_kontext.batch.runner import run_batch
from prefect_flux_kontext.batch.session import open_session
from prefect_flux_kontext.callbacks import receiver as server_module
from prefect_flux_kontext.callbacks.inbox import Inbox
from prefect_flux_kontext.callbacks.options import CallbackOptions
from prefect_flux_kontext.callbacks.receiver import create_receiver, serve_in_background
from prefect_flux_kontext.callbacks.tokens import Attempt, create_token
from prefect_flux_kontext.client.client import FluxKontextClient
from prefect_flux_kontext.errors import ConfigurationError
from prefect_flux_kontext.ledger.store import RecordStore
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from prefect_flux_kontext.settings import FluxKontextSettings
from prefect_flux_kontext.storage.filesystem import OutputFolder
from tests.callbacks.called_batch import manifest
from tests.support.batches import KEY, QUICK

pytestmark = pytest.mark.anyio

SECRET = "a-secret-of-the-tests-0123456789"
OWNER = "0123456789abcdef"


def token(number):
    return create_token(SECRET.encode(), Attempt(OWNER, f"{number:032x}", 1))


def envelope(number):
    return {"code": 200, "data": {"taskId": f"task_{number}", "state": "success"}}


async def stored_task_ids(folder):
    inbox = Inbox(RecordStore(str(folder)))
    names = await inbox.list_names(OWNER)
    return {callback.task_id for name in names for callback in await inbox.read(OWNER, name)}


async def read_to_the_end(reader):
    try:
        return await reader.read()
    except ConnectionResetError:
        return b""


@pytest.mark.parametrize(
    "begun",
    [b"", b"POST / HTTP/1.1\r\nHost: a\r\n", b"POST"],
    ids=["nothing", "half a head", "half a line"],
)
async def test_request_that_begins_too_slowly_is_closed(tmp_path, monkeypatch, begun):
    monkeypatch.setattr(server_module, "_HEAD_TIMEOUT_SECONDS", 0.2)
    async with serve_in_background(create_receiver(str(tmp_path), SECRET), "127.0.0.1", 0) as url:
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(begun)
        assert await read_to_the_end(reader) == b""
        writer.close()


async def test_slow_head_after_a_good_request_is_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(server_module, "_HEAD_TIMEOUT_SECONDS", 0.2)
    async with serve_in_background(create_receiver(str(tmp_path), SECRET), "127.0.0.1", 0) as url:
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"POST /x HT")
        assert await read_to_the_end(reader) == b""
        writer.close()


async def test_hundred_concurrent_callbacks_are_stored(tmp_path):
    async with (
        serve_in_background(create_receiver(str(tmp_path), SECRET), "127.0.0.1", 0) as url,
        httpx.AsyncClient(trust_env=False) as http,
    ):
        replies = await asyncio.gather(
            *(http.post(f"{url}/{token(n)}", json=envelope(n)) for n in range(100))
        )
    assert {reply.status_code for reply in replies} == {200}
    assert await stored_task_ids(tmp_path) == {f"task_{n}" for n in range(100)}


async def test_port_in_use_is_refused(tmp_path):
    receiver = create_receiver(str(tmp_path), SECRET)
    async with serve_in_background(receiver, "127.0.0.1", 0) as url:
        port = int(url.rpartition(":")[2])
        with pytest.raises(ConfigurationError, match=f"127.0.0.1:{port}"):
            async with serve_in_background(receiver, "127.0.0.1", port):
                pass


async def test_batch_with_own_receiver_polls_nothing(tmp_path):
    # Find a free port: the batch needs its URL before it listens.
    async with serve_in_background(create_receiver(str(tmp_path), SECRET), "127.0.0.1", 0) as url:
        pass
    port = int(url.rpartition(":")[2])
    callbacks = CallbackOptions(url=f"{url}/hooks", secret=SECRET, listen=("127.0.0.1", port))
    with running_sandbox(SandboxSettings(mean=0.5, long_edge=16)) as sandbox:
        client = FluxKontextClient(KEY, base_url=sandbox.url)
        async with open_session(
            client,
            OutputFolder(str(tmp_path / "out")),
            RowOptions(cadence=QUICK),
            FluxKontextSettings(),
            callbacks,
        ) as session:
            summary = await run_batch(
                session, manifest(30), lambda wave: wave.run(), concurrent_tasks=100
            )
        bill = sandbox.service.bill()
    assert summary.stored == bill["accepted"] == bill["status_requests"] == 30
    assert not list((tmp_path / "out").rglob("_ledger/callbacks/*/*"))


def start_receiver(folder):
    """Start `flux-kontext receive` in a process of its own; return it and its URL."""
    process = subprocess.Popen(
        [sys.executable, "-m", "prefect_flux_kontext", "receive", "--inbox", folder, "--port=0"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "FLUX_KONTEXT_CALLBACK_SECRET": SECRET},
    )
    return process, re.search(r"http://\S+", process.stdout.readline())[0]


async def test_kill_under_load_loses_no_answered_callback(tmp_path):
    answered = set()
    numbers = iter(range(1_000_000))

    async def call(http, url, enough, busy):
        while True:
            number = next(numbers)
            try:
                reply = await http.post(f"{url}/{token(number)}", json=envelope(number))
            except httpx.HTTPError:
                return
            if reply.status_code == 200:
                answered.add(f"task_{number}")
            if len(answered) >= enough:
                busy.set()

    for kill in range(5):
        process, url = await asyncio.to_thread(start_receiver, tmp_path)
        try:
            async with httpx.AsyncClient(trust_env=False, timeout=30) as http:
                busy, enough = asyncio.Event(), len(answered) + 20 + 30 * kill
                callers = [asyncio.create_task(call(http, url, enough, busy)) for _ in range(20)]
                await busy.wait()
                process.kill()
                await asyncio.gather(*callers)
        finally:
            process.kill()
            process.communicate()
    assert len(answered) > 300
    assert answered - await stored_task_ids(tmp_path) == set()


async def test_sigterm_stops_the_receiver_cleanly(tmp_path):
    process, url = await asyncio.to_thread(start_receiver, tmp_path)
    async with httpx.AsyncClient(trust_env=False) as http:
        assert (await http.post(f"{url}/{token(1)}", json=envelope(1))).status_code == 200
    process.send_signal(signal.SIGTERM)
    out, _ = await asyncio.to_thread(process.communicate)
    assert process.returncode == 0
    assert SECRET not in out
    assert json.dumps(sorted(await stored_task_ids(tmp_path))) == '["task_1"]'
