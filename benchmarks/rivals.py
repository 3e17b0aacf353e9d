"""What the package is measured against: a good script without it, and a first flow without it.

They use nothing of the package, and share no code with it.
"""

from __future__ import annotations

import asyncio
import csv
import hashlib
import io
import json
import os
import time
from contextlib import asynccontextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import httpx
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    Noticed = Callable[[float], None]

SUBMIT, STATUS = "/api/v1/generateTask/flux-kontext", "/api/v1/statusTask/flux-kontext"
REQUESTS_AT_ONCE = 64


class Script:
    """What both need: the rows, the account, the bodies of requests, a place for images.

    Args:
        folder: Holds `manifest.csv`; images go to its `out`.
        noticed: Called with the Unix time at which a task has ended, when that is seen.
    """

    def __init__(self, folder: Path, noticed: Noticed) -> None:
        self.output = folder / "out"
        self.output.mkdir(exist_ok=True)
        with (folder / "manifest.csv").open() as file:
            self.rows = list(csv.DictReader(file))
        self.delay = float(os.environ["FLUX_KONTEXT_POLL_INITIAL_DELAY"])
        self.interval = float(os.environ["FLUX_KONTEXT_POLL_INTERVAL"])
        self.slots = int(os.environ["FLUX_KONTEXT_CONCURRENT_TASKS"])
        self.noticed = noticed
        self.http = {
            "base_url": os.environ["FLUX_KONTEXT_BASE_URL"],
            "headers": {"Authorization": f"Bearer {os.environ['FLUX_KONTEXT_API_KEY']}"},
            "timeout": 60,
            "trust_env": False,
            "verify": False,
        }

    def body(self, row: dict[str, str]) -> dict[str, Any]:
        """The body of a submit."""
        request = {
            "mode": "pro",
            "prompt": row["prompt"],
            "image_urls": [row["image"]],
            "aspect_ratio": "16:9",
            "output_format": row["output_format"],
        }
        return {"provider": "auto", "input": request}

    def task_id(self, reply: httpx.Response) -> str:
        """The task that was accepted."""
        task_id: str = reply.raise_for_status().json()["data"]["taskId"]
        return task_id

    def result(self, reply: httpx.Response) -> str | None:
        """The result's URL, once there is one."""
        status = reply.raise_for_status().json()["data"]
        if status["state"] != "success":
            return None
        self.noticed(status["completeTime"] / 1000)
        url: str = json.loads(status["resultJson"])["resultUrls"][0]
        return url

    def store(self, row: dict[str, str], data: bytes) -> str:
        """Decode, hash and write an image, and see it on the disk; returns its checksum."""
        with Image.open(io.BytesIO(data)) as image:
            image.load()
        checksum = hashlib.sha256(data).hexdigest()
        part = self.output / f".{row['id']}.part"
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.rename(self.output / f"{row['id']}.{row['output_format']}")
        return checksum


async def bare(folder: Path, noticed: Noticed) -> int:
    """On 64 connections.

    httpcore looks through all connections of a pool for each request: pools of one are fastest.
    """
    script = Script(folder, noticed)
    one = httpx.Limits(max_connections=1, max_keepalive_connections=1)
    idle: asyncio.LifoQueue[httpx.AsyncClient] = asyncio.LifoQueue()
    pools = [httpx.AsyncClient(**script.http, limits=one) for _ in range(REQUESTS_AT_ONCE)]
    for pool in pools:
        idle.put_nowait(pool)

    @asynccontextmanager
    async def connection() -> AsyncIterator[httpx.AsyncClient]:
        http = await idle.get()
        try:
            yield http
        finally:
            idle.put_nowait(http)

    await side_by_side(script, connection)
    for pool in pools:
        await pool.aclose()
    return len(script.rows)


async def one_client(folder: Path, noticed: Noticed) -> int:
    """On one client, as one writes it, with a connection for each slot.

    With httpx's usual 100 connections for 1,000 slots it ends in a PoolTimeout.
    """
    script = Script(folder, noticed)
    limits = httpx.Limits(max_connections=script.slots)
    async with httpx.AsyncClient(**script.http, limits=limits) as http:
        await side_by_side(script, lambda: nullcontext(http))
    return len(script.rows)


async def side_by_side(
    script: Script, connection: Callable[[], AbstractAsyncContextManager[httpx.AsyncClient]]
) -> None:
    """All rows within the slots; images in threads."""
    slots = asyncio.Semaphore(script.slots)

    async def run(row: dict[str, str]) -> None:
        async with slots:
            async with connection() as http:
                task_id = script.task_id(await http.post(SUBMIT, json=script.body(row)))
            await asyncio.sleep(script.delay)
            while True:
                async with connection() as http:
                    url = script.result(await http.get(STATUS, params={"taskId": task_id}))
                if url is not None:
                    break
                await asyncio.sleep(script.interval)
        async with connection() as http:
            data = (await http.get(url)).raise_for_status().content
        await asyncio.to_thread(script.store, row, data)

    await asyncio.gather(*map(run, script.rows))


async def mapped(folder: Path, noticed: Noticed) -> int:
    """The Prefect flow that a person writes first: three tasks, mapped over the rows."""
    from prefect import flow, task  # noqa: PLC0415 - slow to import

    script = Script(folder, noticed)
    # Prefect runs mapped tasks in threads, each of its own event loop: no async client is shared.
    http = httpx.Client(**script.http)

    @task
    def submit(row: dict[str, str]) -> str:
        return script.task_id(http.post(SUBMIT, json=script.body(row)))

    @task
    def wait(task_id: str) -> str:
        time.sleep(script.delay)
        while (url := script.result(http.get(STATUS, params={"taskId": task_id}))) is None:
            time.sleep(script.interval)
        return url

    @task
    def store(row: dict[str, str], url: str) -> str:
        return script.store(row, http.get(url).raise_for_status().content)

    @flow
    def restyle(rows: list[dict[str, str]]) -> int:
        return len(store.map(rows, wait.map(submit.map(rows))).result())

    return await asyncio.to_thread(restyle, script.rows)
