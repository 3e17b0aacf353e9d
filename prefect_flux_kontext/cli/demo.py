"""`flux-kontext demo`: the main job in a minute, with all it needs on this machine."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect_flux_kontext.errors import BatchStoppedError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

STYLES = {
    "watercolour": "Turn it into a loose watercolour on rough paper",
    "pencil": "Redraw it as a pencil sketch",
    "oil": "Repaint it as an oil painting with a loaded brush",
    "poster": "Make it a bold poster in a few flat colours",
    "noir": "Retake it in black and white, as film noir",
}
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


def run(options: argparse.Namespace) -> int:
    """Run the demo; 0 when every picture is there."""
    from prefect_flux_kontext.cli.prefect_server import prefect_server  # noqa: PLC0415
    from prefect_flux_kontext.sandbox.server import running_sandbox  # noqa: PLC0415
    from prefect_flux_kontext.sandbox.settings import PHOTOS, SandboxSettings  # noqa: PLC0415

    began = time.monotonic()
    folder = Path(options.folder).resolve()
    pictures = folder / "pictures"
    shutil.rmtree(pictures, ignore_errors=True)
    pictures.mkdir(parents=True)
    photos = sorted(path for path in PHOTOS.iterdir() if path.suffix in (".jpg", ".png", ".webp"))
    print(f"{len(photos)} photographs in {len(STYLES)} styles. Starting a Prefect server …")
    with (
        running_sandbox(SandboxSettings(mean=_MEAN_SECONDS)) as sandbox,
        prefect_server(folder / "prefect") as server,
    ):
        manifest = folder / "manifest.csv"
        _write_manifest(manifest, f"{sandbox.url}/references", photos)
        print(f"The sandbox is at {sandbox.url}, Prefect at {server.url}. Restyling …", flush=True)
        report = _run_flow(manifest, pictures, {**server.environment, **_account(sandbox.url)})
        spent = sandbox.service.bill()
    rows = [_row_of(photo, pictures) for photo in photos]
    complete = all(path.exists() for row in rows for path in row.values())
    if complete:
        _draw_sheet(rows, folder / "contact-sheet.png")
    print(f"""
{report["summary"]}
The sandbox's bill: {spent["accepted"]} tasks, ${spent["dollars"]} of play money.

Look at      {folder / "contact-sheet.png"}
Pictures     {pictures}
Manifest     {manifest}
Run page     {server.url}/runs/flow-run/{report["flow_run_id"]}
             once its server is up again: {server.command}

Took {time.monotonic() - began:.0f} s. Everything that was started is stopped.""")
    return 0 if complete else 1


def _account(base_url: str) -> dict[str, str]:
    return {
        "FLUX_KONTEXT_API_KEY": "sandbox",
        "FLUX_KONTEXT_BASE_URL": base_url,
        "FLUX_KONTEXT_POLL_INITIAL_DELAY": "1",
        "FLUX_KONTEXT_POLL_INTERVAL": "0.5",
    }


def _write_manifest(manifest: Path, references: str, photos: Sequence[Path]) -> None:
    with manifest.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "image", "prompt", "aspect_ratio"])
        for photo in photos:
            for style, prompt in STYLES.items():
                image = f"{references}/{photo.name}"
                writer.writerow([f"{photo.stem}-{style}", image, prompt, "4:3"])


def _run_flow(manifest: Path, pictures: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Run the batch in a process of its own, which says all to the server before it ends."""
    flow = subprocess.run(
        [sys.executable, "-m", "prefect_flux_kontext.cli.demo_flow", str(manifest), str(pictures)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        check=False,
    )
    if flow.returncode:
        raise BatchStoppedError("The demo's flow run did not end; what it said stands above.")
    report: dict[str, Any] = json.loads(flow.stdout)
    return report


def _row_of(photo: Path, pictures: Path) -> dict[str, Path]:
    styled = {style: pictures / f"{photo.stem}-{style}.jpg" for style in STYLES}
    return {f"{photo.stem}, before": photo, **styled}


def _draw_sheet(rows: Sequence[dict[str, Path]], path: Path) -> None:
    from prefect_flux_kontext.report.contact_sheet import contact_sheet  # noqa: PLC0415

    contact_sheet(rows).save(path)
