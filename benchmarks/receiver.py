"""A receiver of callbacks under load: callbacks a second, and how long each waits for its 200.

    python benchmarks/receiver.py --rate 300 --seconds 20

Receiver and load share this machine, each a process of its own. Callbacks are sent when they are
due, however long those before them take, and are then looked for in the inbox.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile

from prefect_flux_kontext.callbacks.inbox import Inbox
from prefect_flux_kontext.callbacks.tokens import Attempt, create_token
from prefect_flux_kontext.ledger.store import RecordStore

SECRET = "the-secret-of-the-benchmark-0123"
OWNER = "0123456789abcdef"
PROGRAM = (sys.executable, "-m", "prefect_flux_kontext")
CONNECTIONS = 64


def main() -> None:
    """Load one receiver and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=float, default=300, help="callbacks a second")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--inbox", help="another place than a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        inbox = options.inbox or folder
        receiver = subprocess.Popen(
            [*PROGRAM, "receive", "--inbox", inbox, "--port", "0"],
            env={**os.environ, "FLUX_KONTEXT_CALLBACK_SECRET": SECRET},
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            url = receiver.stdout.readline().split()[3]
            asyncio.run(load(url, inbox, options.rate, options.seconds))
        finally:
            receiver.terminate()
            receiver.communicate()
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = (used.ru_utime + used.ru_stime) / (options.rate * options.seconds)
        print(f"CPU of the receiver {1000 * cpu:.2f} ms a callback, its start among them")


def request(n: int) -> bytes:
    """A callback as the service sends it."""
    token = create_token(SECRET.encode(), Attempt(OWNER, f"{n:032x}", 1))
    data = {"state": "success", "resultJson": json.dumps({"resultUrls": ["https://a.example/1"]})}
    payload = {"code": 200, "message": "success", "data": {"taskId": f"task_{n}", **data}}
    body = json.dumps(payload).encode()
    head = f"POST /hooks/{token} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def load(url: str, inbox: str, rate: float, seconds: float) -> None:
    """Send callbacks at a fixed rate and print the figures."""
    loop = asyncio.get_running_loop()
    number = int(rate * seconds)
    requests = [request(n) for n in range(number)]
    # Bare sockets, so that the load takes little of the machine that it shares.
    host, port = url.removeprefix("http://").split(":")
    free: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
    for _ in range(CONNECTIONS):
        free.put_nowait(await asyncio.open_connection(host, int(port)))
    waits, answered = [], 0

    async def call(n: int, due: float) -> None:
        nonlocal answered
        reader, writer = connection = await free.get()
        writer.write(requests[n])
        reply = await reader.readuntil(b"\r\n\r\n")
        answered += reply.startswith(b"HTTP/1.1 200")
        free.put_nowait(connection)
        waits.append(loop.time() - due)

    began = loop.time()
    async with asyncio.TaskGroup() as group:
        for n in range(number):
            due = began + n / rate
            await asyncio.sleep(max(0.0, due - loop.time()))
            group.create_task(call(n, due))
    took = loop.time() - began
    while not free.empty():
        free.get_nowait()[1].close()
    kept = Inbox(RecordStore(inbox))
    names = await kept.list_names(OWNER)
    found = {callback.key for name in names for callback in await kept.read(OWNER, name)}
    waits.sort()
    print(f"callbacks a second  {number / took:.0f}, {number} in all")
    print(f"answered with 200   {answered}, kept {len(found)} in {len(names)} files")
    for share in (0.5, 0.99, 1.0):
        print(f"p{share * 100:<4g}               {1000 * waits[int(share * (number - 1))]:.0f} ms")


if __name__ == "__main__":
    main()
