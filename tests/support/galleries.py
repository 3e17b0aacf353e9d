"""Galleries of fake results, and a real browser to open them in."""

import asyncio
import contextlib
import io
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from prefect_flux_kontext.report.gallery.builder import GALLERY, build_gallery
from prefect_flux_kontext.report.gallery.thumbnails import ThumbnailStore
from prefect_flux_kontext.report.results import encode_line
from prefect_flux_kontext.report.thumbnails import image_thumbnail_name, reference_thumbnail_name
from prefect_flux_kontext.storage.filesystem import OutputFolder

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # No name is resolved and only this machine is reached.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]


@contextlib.contextmanager
def running_browser():
    """Start a headless Chromium of this machine; skip the test if there is none."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=_FLAGS)
        try:
            yield browser
        finally:
            browser.close()


def square(colour):
    """A thumbnail of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (32, 24), colour).save(file, "WEBP")
    return file.getvalue()


def line(number, **how):
    """A line of a result manifest; values of None are left out."""
    made = {
        "id": f"row-{number}",
        "line": number + 2,
        "state": "stored",
        "file": f"row-{number}.jpg",
        "width": 1024,
        "height": 768,
        "bytes": 234_567,
        "waiting_seconds": 20 + number % 7,
        "generation_seconds": 15 + number % 5,
        "download_seconds": 0.4,
        "submitted_at": "2026-01-02T03:04:05.000Z",
        "finished_at": "2026-01-02T03:05:05.000Z",
        "cost_usd": 0.03,
        "attempts": 1,
        "stored_before": False,
        "style": ["oil", "pencil", "poster"][number % 3],
        "prompt": "Repaint it",
        "reference_images": [f"https://example.com/{number % 10}.jpg"],
        "mode": "pro",
        "aspect_ratio": "4:3",
        "output_format": "jpeg",
        "provider": "auto",
        "key": f"{number:032x}"[::-1],
        "run": "0123456789abcdef",
        "source": "manifest",
        "recorded_at": "2026-01-02T03:05:06.000Z",
        **how,
    }
    return {name: value for name, value in made.items() if value is not None}


def failed(number, reason="CONTENT_VIOLATION", message="The prompt breaks the rules.", **how):
    """A line of a failed row."""
    nothing = dict.fromkeys(("file", "width", "height", "bytes", "finished_at"))
    return line(number, state="failed", reason=reason, message=message, **nothing, **how)


def gallery_of(folder, lines, *, max_rows=10_000, before=True):
    """Write the gallery of lines into a folder and return the page's URL."""
    output = OutputFolder(os.fspath(folder))
    folder.mkdir(exist_ok=True)
    results = folder / "results.jsonl"
    results.write_text("".join(map(encode_line, lines)))
    # Playwright occupies this thread's event loop.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(
            lambda: asyncio.run(_make(output, results, lines, max_rows, before))
        ).result()
    return (folder / GALLERY).as_uri()


async def _make(output, results, lines, max_rows, before):
    thumbnails = ThumbnailStore(output)
    after, red = square("rebeccapurple"), square("red")
    images = {image_thumbnail_name(row["key"]): after for row in lines if row["state"] == "stored"}
    if before:
        images |= {
            reference_thumbnail_name(url): red
            for row in lines
            for url in row.get("reference_images", [])
        }
    await thumbnails.add("run-000001", images)
    await build_gallery(output, results, thumbnails, max_rows=max_rows, max_new_thumbnails=0)


def page_errors(page, requests):
    """Collect the errors and requests of a page from now on."""
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on(
        "console", lambda message: errors.append(message.text) if message.type == "error" else None
    )
    page.on("request", lambda request: requests.append(request.url))
    return errors


def outside(requests, folder):
    """The requests to anything but the files of a folder."""
    here = (Path(folder).as_uri(), "data:", "blob:")
    return [url for url in requests if not url.startswith(here)]


def until(page, expression):
    """Wait until an expression is true. The page's policy forbids waiting inside of it."""
    for _ in range(3_000):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(10)
    pytest.fail(f"not true after 30 s: {expression}")
