"""Make the pictures of the documentation from a new demo: `make pictures`.

    python docs/pictures.py DEMO

Needs Chromium on this machine. Writes docs/images/*.webp.
"""

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from prefect_flux_kontext.cli.prefect_server import PrefectServer, prefect_server

IMAGES = Path(__file__).with_name("images")
WIDTH, QUALITY = 1200, 75

# Pages of Prefect load logos and scripts from the web; nothing here does.
FLAGS = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]


def save(name: str, image: Image.Image) -> None:
    """Save a picture as WebP, at most 1,200 pixels wide."""
    image = image.convert("RGB")
    image.thumbnail((WIDTH, 4 * WIDTH))
    image.save(IMAGES / f"{name}.webp", quality=QUALITY, method=6)


def capture(browser: Browser, name: str, url: str, shown: str, *, height: int) -> None:
    """Save a page once it shows a text."""
    page = browser.new_page(viewport={"width": WIDTH, "height": height})
    page.set_default_timeout(120_000)
    page.goto(url, wait_until="domcontentloaded")
    page.get_by_text(shown).first.wait_for()
    page.wait_for_load_state("networkidle")
    save(name, Image.open(io.BytesIO(page.screenshot())))
    page.close()


def deploy(server: PrefectServer) -> str:
    """Create the deployments, and return the address of the form of `on-demand`."""
    command = [sys.executable, "-m", "prefect_flux_kontext", "deploy", "s3://my-bucket/photos/"]
    environment = server.environment | {"PATH": os.environ["PATH"]}
    pool = ["work-pool", "create", "flux-kontext", "--type", "process"]
    for words in (
        [sys.executable, "-m", "prefect", *pool],
        [*command, "--output", "s3://my-bucket/restyled"],
    ):
        subprocess.run(words, env=environment, check=True, stdout=subprocess.DEVNULL)
    found = ask(server, "deployments/filter")
    (form,) = [each["id"] for each in found if each["name"] == "on-demand"]
    return f"{server.url}/v2/deployments/deployment/{form}/run"


def ask(server: PrefectServer, path: str) -> list[dict[str, str]]:
    """Return what a filter of Prefect's API finds."""
    reply = httpx.post(f"{server.url}/api/{path}", json={}, trust_env=False)
    found: list[dict[str, str]] = reply.raise_for_status().json()
    return found


def main() -> None:
    """Take the pictures of a demo."""
    folder = Path(sys.argv[1]).resolve()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        sys.exit("Chromium is not installed.")
    IMAGES.mkdir(exist_ok=True)
    save("contact-sheet", Image.open(folder / "contact-sheet.png"))
    gallery = (folder / "pictures" / "gallery.html").as_uri()
    with (
        sync_playwright() as started,
        started.chromium.launch(executable_path=chromium, args=FLAGS) as browser,
        prefect_server(folder / "prefect") as server,
    ):
        capture(browser, "gallery", gallery, "before", height=900)
        run = ask(server, "flow_runs/filter")[0]
        page = f"{server.url}/v2/runs/flow-run/{run['id']}"
        capture(browser, "flow-run", page, "rows stored", height=860)
        artifacts = ask(server, "artifacts/filter")
        summary = next(each["id"] for each in artifacts if each["type"] == "markdown")
        page = f"{server.url}/v2/artifacts/artifact/{summary}"
        capture(browser, "summary", page, "Files", height=860)
        capture(browser, "form", deploy(server), "approve_above_usd", height=1_900)
    for path in sorted(IMAGES.iterdir()):
        print(f"{path.stat().st_size / 1_000:>5.0f} kB  {path}")


if __name__ == "__main__":
    main()
