"""Galleries of many images: how large they are, how long they take to make and to open.

    python benchmarks/gallery.py 100 1000 10000

Opens each in the Chromium of this machine, from the disk, as a person would. The pictures are the
sandbox's photographs, over and over.
"""

from __future__ import annotations

import asyncio
import io
import shutil
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image, ImageOps
from playwright.sync_api import Page, sync_playwright

from prefect_flux_kontext.report.gallery.builder import build_gallery
from prefect_flux_kontext.report.gallery.thumbnails import ThumbnailStore
from prefect_flux_kontext.report.results import encode_line
from prefect_flux_kontext.report.thumbnails import (
    REFERENCE_EDGE_PIXELS,
    RESULT_EDGE_PIXELS,
    image_thumbnail_name,
    make_thumbnail,
    reference_thumbnail_name,
)
from prefect_flux_kontext.sandbox.settings import PHOTOS
from prefect_flux_kontext.storage.filesystem import OutputFolder

STYLES = ("watercolour", "pencil", "oil", "poster", "noir")
TURNS = (ImageOps.mirror, ImageOps.flip, ImageOps.solarize)
FLAGS = ["--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]


def main() -> None:
    """Make and open a gallery of each size."""
    print("| images | page | pictures | making | first pictures | the last | memory of the page |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    after, before = (
        [make_thumbnail(photograph, edge) for photograph in photographs()]
        for edge in (RESULT_EDGE_PIXELS, REFERENCE_EDGE_PIXELS)
    )
    for rows in map(int, sys.argv[1:] or ["100", "1000", "10000"]):
        with tempfile.TemporaryDirectory() as folder:
            measure(rows, Path(folder), after, before)


def photographs() -> list[bytes]:
    """The sandbox's photographs, each as it is and in three other ways."""
    made = []
    for path in sorted(PHOTOS.iterdir()):
        if path.suffix in (".jpg", ".png", ".webp"):
            with Image.open(path) as photograph:
                for turned in (lambda image: image, *TURNS):
                    file = io.BytesIO()
                    turned(photograph.convert("RGB")).save(file, "JPEG", quality=90)
                    made.append(file.getvalue())
    return made


def measure(rows: int, folder: Path, after: list[bytes], before: list[bytes]) -> None:
    """Print the figures of one size."""
    lines = [line(number) for number in range(rows)]
    results = folder / "results.jsonl"
    results.write_text("".join(map(encode_line, lines)))
    pictures = {
        image_thumbnail_name(row["key"]): after[number % len(after)]
        for number, row in enumerate(lines)
    }
    for number, row in enumerate(lines):
        pictures[reference_thumbnail_name(row["reference_images"][0])] = before[
            number // 5 % len(before)
        ]
    output = OutputFolder(str(folder))
    made = asyncio.run(make(output, results, pictures, rows))
    page = (folder / "gallery.html").stat().st_size
    album = sum(path.stat().st_size for path in (folder / "_gallery").glob("*.js"))
    first, last, memory = opened((folder / "gallery.html").as_uri())
    print(
        f"| {rows:,} | {page / 1e6:.2f} MB | {album / 1e6:.1f} MB | {made:.1f} s | {first:.2f} s "
        f"| {last:.2f} s | {memory / 1e6:.0f} MB |",
        flush=True,
    )


async def make(
    output: OutputFolder, results: Path, pictures: dict[str, bytes], rows: int
) -> float:
    """Make the gallery of pictures that are there; returns seconds."""
    album = ThumbnailStore(output)
    await album.add("run-000001", pictures)
    began = time.perf_counter()
    await build_gallery(output, results, album, max_rows=rows, max_new_thumbnails=0)
    return time.perf_counter() - began


def line(number: int) -> dict[str, object]:
    """A line of a result manifest."""
    style = STYLES[number % 5]
    return {
        "id": f"photograph-{number // 5:05}-{style}",
        "line": number + 2,
        "state": "stored",
        "file": f"photograph-{number // 5:05}-{style}.jpg",
        "style": style,
        "prompt": f"Turn it into a {style}. Keep the composition and the subject as they are.",
        "reference_images": [f"https://example.com/photographs/{number // 5:05}.jpg"],
        "mode": "pro",
        "aspect_ratio": "4:3",
        "output_format": "jpeg",
        "provider": "auto",
        "width": 1024,
        "height": 768,
        "bytes": 230_000 + number,
        "format": "jpeg",
        "task_id": f"task_{number:016x}",
        "submitted_at": "2026-01-02T03:04:05.000Z",
        "finished_at": "2026-01-02T03:09:05.000Z",
        "waiting_seconds": 20 + number % 170 / 10,
        "generation_seconds": 15 + number % 130 / 10,
        "download_seconds": 0.4 + number % 90 / 100,
        "cost_usd": 0.03,
        "attempts": 1,
        "key": f"{number:032x}"[::-1],
        "run": "0123456789abcdef",
        "source": "manifest",
        "recorded_at": "2026-01-02T03:09:06.000Z",
        "sku": f"{number:08}",
    }


def opened(url: str) -> tuple[float, float, float]:
    """Seconds until the first pictures are seen, and the last after scrolling; bytes of memory."""
    loaded = "[...document.querySelectorAll('.open img')].filter(i => i.naturalWidth).length >= 5"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        began = time.perf_counter()
        page.goto(url)
        until(page, loaded)
        first = time.perf_counter() - began
        began = time.perf_counter()
        page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
        until(
            page,
            "document.querySelector('.card:last-of-type img')?.naturalWidth > 0"
            " && scrollY + innerHeight >= document.body.scrollHeight - 2",
        )
        last = time.perf_counter() - began
        memory = page.evaluate("performance.memory.usedJSHeapSize")
        browser.close()
    return first, last, memory


def until(page: Page, expression: str) -> None:
    """Wait until it is true; not in the page, whose policy evaluates no text."""
    while not page.evaluate(expression):
        page.wait_for_timeout(10)


if __name__ == "__main__":
    main()
