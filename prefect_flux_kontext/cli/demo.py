"""`flux-kontext demo`: the main job in a minute, with all it needs on this machine."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect_flux_kontext.errors import BatchStoppedError, ConfigurationError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence
    from types import FrameType

STYLES = ("watercolour", "pencil", "oil", "poster", "noir")
_MEAN_SECONDS = 2.0


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "demo",
        help="restyle six photographs in five styles through Prefect, for $0",
        description="Start the sandbox and a Prefect server on this machine, restyle six "
        "photographs in five styles as a flow run, stop both, and say where everything is.",
    )
    parser.add_argument(
        "folder", metavar="FOLDER", nargs="?", default="demo", help="default: %(default)s"
    )
    parser.set_defaults(func=run)


@contextmanager
def _leaving_when_told() -> Iterator[None]:
    """Leave by way of every `finally` while it runs: else the server would outlive us."""

    def leave(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@_leaving_when_told()
def run(options: argparse.Namespace) -> int:
    """Run the demo; 0 when every picture is there."""
    from prefect_flux_kontext.cli.prefect_server import prefect_server
    from prefect_flux_kontext.sandbox.server import running_sandbox
    from prefect_flux_kontext.sandbox.settings import PHOTOS, SandboxSettings

    began = time.monotonic()
    folder = Path(options.folder).resolve()
    pictures, sheet = folder / "pictures", folder / "contact-sheet.png"
    photos = sorted(path for path in PHOTOS.iterdir() if path.suffix in (".jpg", ".png", ".webp"))
    rows = [_row_of(photo, pictures) for photo in photos]
    try:
        pictures.mkdir(parents=True, exist_ok=True)
        # Only what an earlier demo made: the folder may be the user's own.
        for path in (sheet, *(row[style] for row in rows for style in STYLES)):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigurationError(f"The folder {folder} cannot be used: {error}") from None
    print(f"{len(photos)} photographs in {len(STYLES)} styles. Starting a Prefect server …")
    with (
        running_sandbox(SandboxSettings(mean=_MEAN_SECONDS)) as sandbox,
        prefect_server(folder / "prefect") as server,
    ):
        manifest = folder / "manifest.csv"
        _write_manifest(manifest, f"{sandbox.url}/references", photos)
        print(f"The sandbox is at {sandbox.url}, Prefect at {server.url}. Restyling …", flush=True)
        report = _run_flow(manifest, pictures, server.environment | _account(sandbox.url))
        bill = sandbox.service.bill()
    complete = all(path.exists() for row in rows for path in row.values())
    if complete:
        _draw_sheet(rows, sheet)
    print(f"""
{report["summary"]}
The sandbox's bill: {bill["accepted"]} tasks, ${float(bill["dollars"]):.2f} of play money.

Look at      {sheet if complete else f"{pictures}: some are missing"}
Gallery      {(pictures / "gallery.html").as_uri()}
Pictures     {pictures}
Manifest     {manifest}
Run page     {server.url}/runs/flow-run/{report["flow_run_id"]}
             once its server is up again:
             {server.command}

Took {time.monotonic() - began:.0f} s. Everything that was started is stopped.""")
    return 0 if complete else 1


def _account(base_url: str) -> dict[str, str]:
    return {
        "FLUX_KONTEXT_API_KEY": "sandbox",
        "FLUX_KONTEXT_BASE_URL": base_url,
        "FLUX_KONTEXT_POLL_INITIAL_DELAY": "1",
        "FLUX_KONTEXT_POLL_INTERVAL": "0.5",
        # Nor does a setting for the user's own account slow it down.
        "FLUX_KONTEXT_POLL_TIMEOUT": "",
        "FLUX_KONTEXT_REQUESTS_PER_MINUTE": "",
        "FLUX_KONTEXT_CONCURRENT_TASKS": "",
    }


def _write_manifest(manifest: Path, references: str, photos: Sequence[Path]) -> None:
    with manifest.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "image", "aspect_ratio"])
        writer.writerows([photo.stem, f"{references}/{photo.name}", "4:3"] for photo in photos)


def _run_flow(manifest: Path, pictures: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Run the batch in a process of its own, which says all to the server before it ends."""
    module = "prefect_flux_kontext.cli.demo_flow"
    flow = subprocess.run(
        [sys.executable, "-m", module, str(manifest), str(pictures), *STYLES],
        env=environment,
        stdout=subprocess.PIPE,
        check=False,
        # Ctrl-C on the terminal is for us alone; `run` stops it.
        start_new_session=True,
    )
    if flow.returncode:
        raise BatchStoppedError("The demo's flow run did not end; what it said stands above.")
    report: dict[str, Any] = json.loads(flow.stdout)
    return report


def _row_of(photo: Path, pictures: Path) -> dict[str, Path]:
    styled = {style: pictures / photo.stem / f"{style}.jpg" for style in STYLES}
    return {f"{photo.stem}, before": photo, **styled}


def _draw_sheet(rows: Sequence[dict[str, Path]], path: Path) -> None:
    from prefect_flux_kontext.report.gallery.contact_sheet import contact_sheet

    contact_sheet([list(row.items()) for row in rows]).save(path)
