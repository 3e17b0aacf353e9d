"""A flow that is killed after its submits, and run again: nothing is paid for twice.

    python examples/pay_once/seasons.py seasons

The output is also the ledger. The first run pays for four images and is killed before it waits
for them. The second run submits the same requests, gets the same tasks and stores their images.
After each run, the sandbox's bill is printed.
"""

import asyncio
import multiprocessing
import os
import signal
import sys

import httpx
from prefect import flow

from prefect_flux_kontext import (
    GenerationRequest,
    persist_images,
    submit_generation,
    wait_for_generation,
)

SEASONS = ("spring", "summer", "autumn", "winter")


@flow
async def draw_seasons(output: str, is_killed: bool) -> list[str]:
    """Draw each season, and return the URIs of the images."""
    requests = [GenerationRequest(prompt=f"A harbour in {season}, in oil") for season in SEASONS]
    tasks = [await submit_generation(request, ledger=output) for request in requests]
    if is_killed:
        os.kill(os.getpid(), signal.SIGKILL)
    uris = []
    for season, task in zip(SEASONS, tasks, strict=True):
        images = await persist_images(await wait_for_generation(task), output, name=season)
        uris.append(images[0].uri)
    return uris


def run_flow(output: str, is_killed: bool) -> None:
    """Run the flow, as a process of its own."""
    for uri in asyncio.run(draw_seasons(output, is_killed)):
        print(uri)


if __name__ == "__main__":
    bill_url = f"{os.environ['FLUX_KONTEXT_BASE_URL']}/sandbox/bill"
    for is_killed in (True, False):
        process = multiprocessing.get_context("spawn").Process(
            target=run_flow, args=(sys.argv[1], is_killed)
        )
        process.start()
        process.join()
        bill = httpx.get(bill_url, trust_env=False).json()
        billed = f"{bill['accepted']} images, ${bill['dollars']}"
        print(f"Exit status {process.exitcode}. Billed so far: {billed}.")
