"""`flux-kontext demo`: a whole batch through Prefect on this machine, for $0."""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from prefect_flux_kontext.cli.prefect_server import prefect_server
from prefect_flux_kontext.errors import BatchStoppedError, ConfigurationError
from prefect_flux_kontext.report.gallery.builder import draw_contact_sheet
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import PHOTOS, SandboxSettings

STYLES = ("watercolour", "pencil", "oil", "poster", "noir")

# Long enough to show tasks that run side by side, short enough for a demo of a minute.
_MEAN_GENERATION_SECONDS = 2.0

_FLOW_PROGRAM = "from prefect_flux_kontext.cli.demo import run_flow; run_flow()"
"""Not `python -m`: the package has imported this module before it would run it again."""


@contextmanager
def _exit_on_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into an exit that stops the server on the way out."""

    def leave(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@_exit_on_signals()
def run_demo(options: argparse.Namespace) -> int:
    """Run `demo` and return its exit status: 0 if every picture was stored, otherwise 1."""
    began = time.monotonic()
    folder = Path(options.folder).resolve()
    pictures, sheet = folder / "pictures", folder / "contact-sheet.png"
    photos = sorted(path for path in PHOTOS.iterdir() if path.suffix in (".jpg", ".png", ".webp"))
    rows = [
        {f"{photo.stem}, before": photo}
        | {style: pictures / photo.stem / f"{style}.jpg" for style in STYLES}
        for photo in photos
    ]
    try:
        pictures.mkdir(parents=True, exist_ok=True)
        # Remove only the files of an earlier demo: the folder may hold files of the user's.
        for path in (sheet, *(row[style] for row in rows for style in STYLES)):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigurationError(f"The folder {folder} cannot be used: {error}") from None
    print(f"{len(photos)} photographs in {len(STYLES)} styles. Starting a Prefect server …")
    with (
        running_sandbox(SandboxSettings(mean=_MEAN_GENERATION_SECONDS)) as sandbox,
        prefect_server(folder / "prefect") as server,
    ):
        manifest = folder / "manifest.csv"
        with manifest.open("w", newline="", encoding="utf-8") as file:
            references = [
                (photo.stem, f"{sandbox.url}/references/{photo.name}") for photo in photos
            ]
            csv.writer(file).writerows([("id", "image"), *references])
        print(f"The sandbox is at {sandbox.url}, Prefect at {server.url}. Restyling …", flush=True)
        environment = server.environment | _account_environment(sandbox.url)
        report = _run_flow_process(manifest, pictures, environment)
        bill = sandbox.service.bill()
    complete = all(path.exists() for row in rows for path in row.values())
    if complete:
        draw_contact_sheet([list(row.items()) for row in rows]).save(sheet)
    print(f"""
{report["summary"]}
Sandbox bill: {bill["accepted"]} tasks, ${float(bill["dollars"]):.2f} (not real money)

Look at      {sheet if complete else f"{pictures}: some pictures are missing"}
Gallery      {(pictures / "gallery.html").as_uri()}
Pictures     {pictures}
Manifest     {manifest}
Run page     {server.url}/runs/flow-run/{report["flow_run_id"]}
             (first start the server again:)
             {server.command}

Took {time.monotonic() - began:.0f} s. The sandbox and the Prefect server are stopped.""")
    return 0 if complete else 1


def run_flow() -> None:
    """Run the demo's flow in this process; `sys.argv` holds MANIFEST OUTPUT STYLE ….

    Prints the id of the flow run and the summary as JSON.
    """
    manifest, output, *styles = sys.argv[1:]
    print(json.dumps(asyncio.run(_run_flow(manifest, output, styles))))


async def _run_flow(manifest: str, output: str, styles: list[str]) -> dict[str, str]:
    from prefect_flux_kontext.flows import style_transfer_batch

    state = await style_transfer_batch(manifest, output, styles=styles, return_state=True)
    summary = await state.aresult()
    flow_run_id = str(state.state_details.flow_run_id)
    return {"flow_run_id": flow_run_id, "summary": str(summary)}


def _run_flow_process(
    manifest: Path, pictures: Path, environment: dict[str, str]
) -> dict[str, Any]:
    """Run the flow in its own process, so that Prefect has received everything when it ends."""
    flow = subprocess.run(
        [sys.executable, "-c", _FLOW_PROGRAM, str(manifest), str(pictures), *STYLES],
        env=environment,
        stdout=subprocess.PIPE,
        check=False,
        # Ctrl-C on the terminal reaches only this process, which then stops the flow.
        start_new_session=True,
    )
    if flow.returncode:
        raise BatchStoppedError("The demo's flow run did not complete; its log is above.")
    report: dict[str, Any] = json.loads(flow.stdout)
    return report


def _account_environment(base_url: str) -> dict[str, str]:
    return {
        "FLUX_KONTEXT_API_KEY": "sandbox",
        "FLUX_KONTEXT_BASE_URL": base_url,
        "FLUX_KONTEXT_POLL_INITIAL_DELAY": "1",
        "FLUX_KONTEXT_POLL_INTERVAL": "0.5",
        # Reset: the user's settings for a real account would slow the demo down.
        "FLUX_KONTEXT_POLL_TIMEOUT": "",
        "FLUX_KONTEXT_REQUESTS_PER_MINUTE": "",
        "FLUX_KONTEXT_CONCURRENT_TASKS": "",
    }
