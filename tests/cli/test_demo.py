"""`flux-kontext demo`: the whole job end to end, and nothing left running, however it ends."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from PIL import Image

from prefect_flux_kontext.cli import main
from prefect_flux_kontext.images.decode import inspect_image

COMMAND = Path(sys.executable).parent / "flux-kontext"


def find_processes(folder):
    """Return the ids of processes whose environment or command names the folder."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            text = (process / "environ").read_bytes() + (process / "cmdline").read_bytes()
        except OSError:
            continue
        if process.name.isdigit() and int(process.name) != os.getpid():
            found += [process.name] if str(folder).encode() in text else []
    return found


@pytest.mark.timeout(180)
def test_demo_restyles_thirty_pictures_and_cleans_up(tmp_path):
    """The pictures and the Prefect record stay; no process does."""
    # A space in the path, a file of the user's own, and settings for another account.
    folder = tmp_path / "my demo"
    (folder / "pictures").mkdir(parents=True)
    (folder / "pictures" / "holiday.jpg").write_text("not ours")
    outside = {
        "FLUX_KONTEXT_REQUESTS_PER_MINUTE": "1",
        "FLUX_KONTEXT_POLL_TIMEOUT": "0.1",
        "PREFECT_API_KEY": "of-another-server",
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": "sqlite+aiosqlite:////no/such/database",
        "HTTP_PROXY": "http://127.0.0.1:1",
    }
    ran = subprocess.run(
        [COMMAND, "demo", folder],
        env=os.environ | outside,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stdout + ran.stderr
    assert "30 of 30 rows stored" in ran.stdout
    assert "30 tasks, $0.9" in ran.stdout

    pictures = sorted((folder / "pictures").glob("*/*.jpg"))
    assert len(pictures) == 30
    for picture in pictures:
        assert inspect_image(picture.read_bytes()).format == "jpeg"
    assert len({picture.read_bytes() for picture in pictures}) == 30
    with Image.open(folder / "contact-sheet.png") as sheet:
        assert sheet.size == (6 * 256, 6 * 216)
    gallery = folder / "pictures" / "gallery.html"
    assert f"Gallery      {gallery.as_uri()}" in ran.stdout
    # Thirty images and the six photographs they were made from.
    assert gallery.read_text().count("data:image/webp") == 36
    assert (folder / "pictures" / "holiday.jpg").read_text() == "not ours"
    assert find_processes(folder) == []

    page = re.search(r"(http://127\.0\.0\.1:\d+)/runs/flow-run/([0-9a-f-]{36})", ran.stdout)
    again = ran.stdout.partition("(first start the server again:)")[2].split("\n")[1].strip()
    assert shlex.split(again)[0] == f"PREFECT_HOME={folder / 'prefect'}"
    server = subprocess.Popen(
        ["/bin/sh", "-c", f"exec env {again}"],
        env=os.environ
        | {"PATH": f"{COMMAND.parent}:{os.environ['PATH']}", "PREFECT_HOME": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        state = None
        while state is None:
            assert server.poll() is None
            time.sleep(0.2)
            try:
                run = httpx.get(f"{page[1]}/api/flow_runs/{page[2]}", trust_env=False)
                state = run.json()["state"]["type"]
            except httpx.TransportError:
                continue
    finally:
        server.terminate()
        server.wait()
    assert state == "COMPLETED"


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("number", "stream", "after", "status"),
    [
        (signal.SIGINT, "stderr", "Beginning flow run", 130),
        (signal.SIGTERM, "stdout", "Starting a Prefect server", 143),
    ],
)
def test_stopped_demo_stops_its_processes(number, stream, after, status, tmp_path):
    with subprocess.Popen(
        [COMMAND, "demo", tmp_path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # As on a terminal: Ctrl-C reaches the whole group.
        start_new_session=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    ) as demo:
        while after not in getattr(demo, stream).readline():
            assert demo.poll() is None
        # The server prints once it runs, so the demo knows of its process by then.
        log = tmp_path / "prefect" / "server.log"
        while not (log.exists() and log.stat().st_size):
            time.sleep(0.05)
        os.killpg(demo.pid, number)
        out, err = demo.communicate()
    assert demo.returncode == status, err
    assert "Traceback" not in out + err
    assert find_processes(tmp_path) == []


def test_unusable_folder_exits_2(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("in the way")
    assert main(["demo", str(file)]) == 2
    assert f"The folder {file} cannot be used" in capsys.readouterr().err


def test_demo_restores_signal_handlers(tmp_path):
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    (tmp_path / "file").touch()
    assert main(["demo", str(tmp_path / "file")]) == 2
    assert [signal.getsignal(number) for number in numbers] == before
