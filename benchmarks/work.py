"""One piece of work in a process of its own, measured: a rival of `run.py`, or ourselves.

    python benchmarks/work.py batch FOLDER     # this package, without Prefect
    python benchmarks/work.py flow FOLDER      # this package as a flow
    python benchmarks/work.py bare FOLDER      # asyncio and httpx alone, no ledger
    python benchmarks/work.py fixed:5 FOLDER   # like `batch`, but asks every 5 s
    python benchmarks/work.py mapped FOLDER    # a Prefect flow, three tasks, `.map`

The account and the cadence come from the environment. FOLDER holds `manifest.csv`; images go to
`FOLDER/out`. Figures are printed as JSON.
"""

from __future__ import annotations

import asyncio
import csv
import hashlib
import io
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

UNNOTICED: list[float] = []
"""Seconds from the end of each task to its being noticed, by the clock both sides share."""


def noticed(ended_at: float | None) -> None:
    """Note how long ago a task had ended, in Unix seconds."""
    if ended_at is not None:
        UNNOTICED.append(time.time() - ended_at)


def main() -> None:
    """Do the work and print what it took."""
    work, folder = sys.argv[1], Path(sys.argv[2])
    name, _, seconds = work.partition(":")
    works: dict[str, Callable[[], Awaitable[int]]] = {
        "batch": lambda: batch(folder),
        "flow": lambda: flow(folder),
        "bare": lambda: bare(folder),
        "fixed": lambda: batch(folder, fixed=float(seconds)),
        "mapped": lambda: mapped(folder),
    }
    began = time.perf_counter()
    stored = asyncio.run(works[name]())  # type: ignore[arg-type]
    usage = resource.getrusage(resource.RUSAGE_SELF)
    UNNOTICED.sort()
    told = {
        "stored": stored,
        "seconds": time.perf_counter() - began,
        "cpu": usage.ru_utime + usage.ru_stime,
        "peak_mb": usage.ru_maxrss / 1024,
    }
    if UNNOTICED:
        for share in (50, 95):
            told[f"unnoticed_p{share}"] = UNNOTICED[(len(UNNOTICED) - 1) * share // 100]
    print(json.dumps(told))


async def batch(folder: Path, *, fixed: float | None = None) -> int:
    """The batch as `flux-kontext run` does it; `fixed` asks at that interval from the start."""
    from prefect_flux_kontext.api.client import FluxKontextClient  # noqa: PLC0415 - measured
    from prefect_flux_kontext.batch import rows  # noqa: PLC0415
    from prefect_flux_kontext.batch.batch import run_batch  # noqa: PLC0415
    from prefect_flux_kontext.batch.session import batch_session  # noqa: PLC0415
    from prefect_flux_kontext.manifest.reading import Manifest  # noqa: PLC0415
    from prefect_flux_kontext.settings import FluxKontextSettings  # noqa: PLC0415
    from prefect_flux_kontext.storage import OutputFolder  # noqa: PLC0415

    ours = rows.wait_until_ended

    async def wait(client: Any, task: Any, cadence: Any) -> Any:
        if fixed is not None:
            client.governor._curves.clear()  # noqa: SLF001 - it learns nothing
            cadence = cadence.model_copy(update={"initial_delay": fixed, "interval": fixed})
        result = await ours(client, task, cadence)
        noticed(result.completed_at and result.completed_at.timestamp())
        return result

    rows.wait_until_ended = wait
    settings = FluxKontextSettings()
    client = FluxKontextClient(
        settings.required_api_key(),
        base_url=settings.base_url,
        requests_per_minute=settings.requests_per_minute,
        concurrent_tasks=settings.concurrent_tasks,
    )
    options = rows.RowOptions(cadence=settings.cadence())
    output = OutputFolder(str(folder / "out"))
    async with batch_session(client, output, options, settings) as session:
        summary = await run_batch(
            session,
            Manifest(str(folder / "manifest.csv")).rows(),
            lambda wave: wave.run(),
            concurrent_tasks=settings.concurrent_tasks,
        )
    return summary.stored


async def flow(folder: Path) -> int:
    """The batch as a flow, recorded by the Prefect server of the environment."""
    from prefect_flux_kontext.flows import style_transfer_batch  # noqa: PLC0415

    summary = await style_transfer_batch(str(folder / "manifest.csv"), str(folder / "out"))
    return summary.stored


SUBMIT, STATUS = "/api/v1/generateTask/flux-kontext", "/api/v1/statusTask/flux-kontext"
LIMITS = httpx.Limits(max_connections=128, max_keepalive_connections=128)


def body(row: dict[str, str]) -> dict[str, Any]:
    """The body of a submit."""
    request = {
        "mode": "pro",
        "prompt": row["prompt"],
        "image_urls": [row["image"]],
        "aspect_ratio": "16:9",
        "output_format": row["output_format"],
    }
    return {"provider": "auto", "input": request}


def read_task_id(reply: httpx.Response) -> str:
    """The task that was accepted."""
    task_id: str = reply.raise_for_status().json()["data"]["taskId"]
    return task_id


def read_url(reply: httpx.Response) -> str | None:
    """The result's URL, once there is one."""
    status = reply.raise_for_status().json()["data"]
    if status["state"] != "success":
        return None
    noticed(status["completeTime"] / 1000)
    url: str = json.loads(status["resultJson"])["resultUrls"][0]
    return url


class Bare:
    """What a script without this package does: submit, poll, download, decode, hash, write."""

    def __init__(self, folder: Path) -> None:
        self.output = folder / "out"
        self.output.mkdir(exist_ok=True)
        with (folder / "manifest.csv").open() as file:
            self.rows = list(csv.DictReader(file))
        self.delay = float(os.environ["FLUX_KONTEXT_POLL_INITIAL_DELAY"])
        self.interval = float(os.environ["FLUX_KONTEXT_POLL_INTERVAL"])
        self.http = httpx.AsyncClient(
            base_url=os.environ["FLUX_KONTEXT_BASE_URL"],
            headers={"Authorization": f"Bearer {os.environ['FLUX_KONTEXT_API_KEY']}"},
            limits=LIMITS,
            timeout=60,
        )

    async def wait(self, task_id: str) -> str:
        """Poll until the task has ended; returns its result's URL."""
        await asyncio.sleep(self.delay)
        while True:
            url = read_url(await self.http.get(STATUS, params={"taskId": task_id}))
            if url is not None:
                return url
            await asyncio.sleep(self.interval)

    async def store(self, row: dict[str, str], url: str) -> str:
        """Download, decode, hash and write the image; returns its checksum."""
        data = (await self.http.get(url)).raise_for_status().content
        return await asyncio.to_thread(self.write, row["id"], data)

    def write(self, name: str, data: bytes) -> str:
        """Decode, hash and write an image, and see it on the disk."""
        from PIL import Image  # noqa: PLC0415

        with Image.open(io.BytesIO(data)) as image:
            image.load()
        part = self.output / f".{name}.part"
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.rename(self.output / name)
        return hashlib.sha256(data).hexdigest()


async def bare(folder: Path) -> int:
    """All rows side by side, within the slots."""
    script = Bare(folder)
    slots = asyncio.Semaphore(min(1_000, int(os.environ["FLUX_KONTEXT_CONCURRENT_TASKS"])))

    async def row(cells: dict[str, str]) -> None:
        async with slots:
            task_id = read_task_id(await script.http.post(SUBMIT, json=body(cells)))
            url = await script.wait(task_id)
        await script.store(cells, url)

    async with script.http:
        await asyncio.gather(*map(row, script.rows))
    return len(script.rows)


async def mapped(folder: Path) -> int:
    """The Prefect flow that a person writes first: three tasks, mapped over the rows."""
    import httpx  # noqa: PLC0415
    from prefect import flow, task  # noqa: PLC0415

    script = Bare(folder)
    # Prefect runs mapped tasks in threads, each of its own event loop: no async client is shared.
    http = httpx.Client(
        base_url=script.http.base_url, headers=script.http.headers, timeout=60, limits=LIMITS
    )

    @task
    def submit(row: dict[str, str]) -> str:
        return read_task_id(http.post(SUBMIT, json=body(row)))

    @task
    def wait(task_id: str) -> str:
        time.sleep(script.delay)
        while (url := read_url(http.get(STATUS, params={"taskId": task_id}))) is None:
            time.sleep(script.interval)
        return url

    @task
    def store(row: dict[str, str], url: str) -> str:
        return script.write(row["id"], http.get(url).raise_for_status().content)

    @flow
    def restyle(rows: list[dict[str, str]]) -> int:
        return len(store.map(rows, wait.map(submit.map(rows))).result())

    return await asyncio.to_thread(restyle, script.rows)


if __name__ == "__main__":
    main()
