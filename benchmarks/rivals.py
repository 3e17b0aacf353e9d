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
from typing import TYPE_CHECKING, Any

import aiohttp
import httpx
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Noticed = Callable[[float], None]

SUBMIT, STATUS = "/api/v1/generateTask/flux-kontext", "/api/v1/statusTask/flux-kontext"
CONNECTIONS = 128


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
        self.base_url = os.environ["FLUX_KONTEXT_BASE_URL"]
        self.headers = {"Authorization": f"Bearer {os.environ['FLUX_KONTEXT_API_KEY']}"}

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

    def result(self, reply: dict[str, Any]) -> str | None:
        """The result's URL, once there is one."""
        status = reply["data"]
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
    """One session of aiohttp, all rows within the slots, images in threads."""
    script = Script(folder, noticed)
    slots = asyncio.Semaphore(script.slots)

    async def run(row: dict[str, str]) -> None:
        async with slots:
            async with http.post(SUBMIT, json=script.body(row)) as reply:
                task_id = (await reply.json())["data"]["taskId"]
            await asyncio.sleep(script.delay)
            while True:
                async with http.get(STATUS, params={"taskId": task_id}) as reply:
                    url = script.result(await reply.json())
                if url is not None:
                    break
                await asyncio.sleep(script.interval)
        async with http.get(url) as reply:
            data = await reply.read()
        await asyncio.to_thread(script.store, row, data)

    async with aiohttp.ClientSession(
        script.base_url,
        headers=script.headers,
        connector=aiohttp.TCPConnector(limit=CONNECTIONS),
        raise_for_status=True,
    ) as http:
        await asyncio.gather(*map(run, script.rows))
    return len(script.rows)


async def mapped(folder: Path, noticed: Noticed) -> int:
    """The Prefect flow that a person writes first: three tasks, mapped over the rows."""
    from prefect import flow, task  # noqa: PLC0415 - slow to import

    script = Script(folder, noticed)
    # Prefect runs mapped tasks in threads, each of its own event loop: no async client is shared.
    http = httpx.Client(
        base_url=script.base_url, headers=script.headers, timeout=60, trust_env=False
    )

    @task
    def submit(row: dict[str, str]) -> str:
        reply = http.post(SUBMIT, json=script.body(row)).raise_for_status()
        task_id: str = reply.json()["data"]["taskId"]
        return task_id

    @task
    def wait(task_id: str) -> str:
        time.sleep(script.delay)
        while True:
            reply = http.get(STATUS, params={"taskId": task_id}).raise_for_status()
            if url := script.result(reply.json()):
                return url
            time.sleep(script.interval)

    @task
    def store(row: dict[str, str], url: str) -> str:
        return script.store(row, http.get(url).raise_for_status().content)

    @flow
    def restyle(rows: list[dict[str, str]]) -> int:
        return len(store.map(rows, wait.map(submit.map(rows))).result())

    return await asyncio.to_thread(restyle, script.rows)
