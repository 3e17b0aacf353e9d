"""One piece of work in a process of its own, measured: a rival of `run.py`, or ourselves.

    python benchmarks/work.py batch FOLDER     # this package, without Prefect
    python benchmarks/work.py flow FOLDER      # this package as a flow
    python benchmarks/work.py called FOLDER    # like `batch`, but called back
    python benchmarks/work.py fixed:5 FOLDER   # like `batch`, but asks every 5 s
    python benchmarks/work.py bare FOLDER      # asyncio and aiohttp alone, no ledger
    python benchmarks/work.py mapped FOLDER    # a Prefect flow, three tasks, `.map`

The account and the cadence come from the environment. FOLDER holds `manifest.csv`; images go to
`FOLDER/out`. Figures are printed as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rivals

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

UNNOTICED: list[float] = []
"""Seconds from the end of each task to its being noticed, by the clock both sides share."""


END_PHASE: dict[str, float] = {}
"""Seconds of merging results and making the gallery, and by how much the peak memory grew."""


def noticed(ended_at: float) -> None:
    """Note how long ago a task had ended, in Unix seconds."""
    UNNOTICED.append(time.time() - ended_at)


def peak_mb() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Do the work and print what it took."""
    work, folder = sys.argv[1], Path(sys.argv[2])
    name, _, seconds = work.partition(":")
    works: dict[str, Callable[[], Awaitable[int]]] = {
        "batch": lambda: batch(folder),
        "flow": lambda: flow(folder),
        "called": lambda: called(folder),
        "fixed": lambda: batch(folder, fixed=float(seconds)),
        "bare": lambda: rivals.bare(folder, noticed),
        "mapped": lambda: rivals.mapped(folder, noticed),
    }
    began = time.perf_counter()
    stored = asyncio.run(works[name]())  # type: ignore[arg-type]
    usage = resource.getrusage(resource.RUSAGE_SELF)
    UNNOTICED.sort()
    figures = {
        "stored": stored,
        "seconds": time.perf_counter() - began,
        "cpu": usage.ru_utime + usage.ru_stime,
        "peak_mb": peak_mb(),
        **END_PHASE,
    }
    if UNNOTICED:
        for share in (50, 95):
            figures[f"unnoticed_p{share}"] = UNNOTICED[(len(UNNOTICED) - 1) * share // 100]
    print(json.dumps(figures))


async def batch(folder: Path, *, fixed: float | None = None) -> int:
    """The batch as `flux-kontext run` does it; `fixed` asks at that interval from the start."""
    from prefect_flux_kontext.batch import storing  # noqa: PLC0415
    from prefect_flux_kontext.batch.policy import RowOptions  # noqa: PLC0415
    from prefect_flux_kontext.batch.runner import run_batch  # noqa: PLC0415
    from prefect_flux_kontext.batch.session import open_session  # noqa: PLC0415
    from prefect_flux_kontext.callbacks.options import resolve_callback_options  # noqa: PLC0415
    from prefect_flux_kontext.client.client import FluxKontextClient  # noqa: PLC0415 - measured
    from prefect_flux_kontext.manifest.reader import Manifest  # noqa: PLC0415
    from prefect_flux_kontext.settings import FluxKontextSettings  # noqa: PLC0415
    from prefect_flux_kontext.storage.filesystem import OutputFolder  # noqa: PLC0415

    ours = storing.wait_until_ended

    async def wait(client: Any, task: Any, cadence: Any, pauses: Any) -> Any:
        if fixed is not None:
            client.limiter._latency_models.clear()  # noqa: SLF001 - it learns nothing
            cadence = cadence.model_copy(update={"initial_delay": fixed, "interval": fixed})
        result = await ours(client, task, cadence, pauses)
        if result.completed_at is not None:
            noticed(result.completed_at.timestamp())
        return result

    storing.wait_until_ended = wait  # type: ignore[assignment]
    settings = FluxKontextSettings()
    client = FluxKontextClient(
        settings.require_api_key(),
        base_url=settings.base_url,
        requests_per_minute=settings.requests_per_minute,
        concurrent_tasks=settings.concurrent_tasks,
    )
    options = RowOptions(cadence=settings.cadence())
    output = OutputFolder(str(folder / "out"))
    callbacks = resolve_callback_options(settings)
    async with open_session(client, output, options, settings, callbacks) as session:
        summary = await run_batch(
            session,
            Manifest(str(folder / "manifest.csv")).rows(),
            lambda wave: wave.run(),
            concurrent_tasks=settings.concurrent_tasks,
        )
    return summary.stored


async def called(folder: Path) -> int:
    """Like `batch`, but the service calls: the receiver is in this process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    os.environ["FLUX_KONTEXT_CALLBACK_URL"] = f"http://{address}/hooks"
    os.environ["FLUX_KONTEXT_CALLBACK_LISTEN"] = address
    os.environ["FLUX_KONTEXT_CALLBACK_SECRET"] = "the-secret-of-the-benchmark-0123"
    return await batch(folder)


async def flow(folder: Path) -> int:
    """The batch as a flow, recorded by the Prefect server of the environment."""
    from prefect_flux_kontext.flows import style_transfer_batch  # noqa: PLC0415
    from prefect_flux_kontext.report import builder as report  # noqa: PLC0415

    ours = report.update_report

    async def measured(*args: Any, **how: Any) -> int:
        before, began = peak_mb(), time.perf_counter()
        try:
            return await ours(*args, **how)
        finally:
            END_PHASE["end_seconds"] = time.perf_counter() - began
            END_PHASE["end_mb"] = peak_mb() - before

    report.update_report = measured
    summary = await style_transfer_batch(str(folder / "manifest.csv"), str(folder / "out"))
    return summary.stored


if __name__ == "__main__":
    main()
