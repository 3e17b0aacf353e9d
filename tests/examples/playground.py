"""The examples as a newcomer runs them: from their README, in a shell, against the playground."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import httpx

ROOT = Path(__file__).parents[2]
COMMANDS = re.findall(r"^\$ (.+)$", (ROOT / "examples" / "README.md").read_text(), re.MULTILINE)
"""All that the README has a reader type."""

_PATIENCE = 60


def until(true, what):
    """Wait for a condition, and return what it came to."""
    deadline = time.monotonic() + _PATIENCE
    while not (found := true()):
        assert time.monotonic() < deadline, f"still waiting for {what}"
        time.sleep(0.1)
    return found


class Playground:
    """A copy of the examples in an empty folder, with the playground running.

    Attributes:
        folder: Where the commands are run.
        names: What `playground/environment` sets.
        bucket: The filesystem of the playground's S3.
    """

    def __init__(self, folder):
        self.folder = folder
        home = folder / "home"
        home.mkdir()
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self._outside = {
            "PATH": path,
            "HOME": str(home),
            "PYTHONPATH": str(ROOT),
            "DO_NOT_TRACK": "1",
            "PYTHONUNBUFFERED": "1",
        }

    def look_around(self):
        """Read what the playground has said of itself."""
        text = (self.folder / "playground" / "environment").read_text()
        self.names = dict(re.findall(r"^export (\w+)='(.*)'$", text, re.MULTILINE))
        options = {
            name: self.names[f"FSSPEC_S3_{name.upper()}"]
            for name in ("endpoint_url", "key", "secret")
        }
        self.bucket = fsspec.filesystem("s3", use_listings_cache=False, **options)

    def ran(self, command):
        """What a command of the README prints, which ends well."""
        assert command in COMMANDS
        shell = f". playground/environment && exec {command}"
        done = subprocess.run(
            ["/bin/sh", "-c", shell],
            cwd=self.folder,
            env=self._outside,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @contextlib.contextmanager
    def running(self, command, until_it_says):
        """Run a command of the README, once it has said something, until Ctrl-C ends it."""
        assert command in COMMANDS
        known = (self.folder / "playground" / "environment").exists()
        log = self.folder / f"{command.split()[1].replace('/', '-')}.log"
        with log.open("wb") as printed:
            process = subprocess.Popen(
                ["/bin/sh", "-c", ". playground/environment && " * known + f"exec {command}"],
                cwd=self.folder,
                env=self._outside,
                stdout=printed,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                until(
                    lambda: until_it_says in log.read_text() or process.poll() is not None, command
                )
                assert process.poll() is None, log.read_text()
                yield
            finally:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(_PATIENCE)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            assert process.returncode == 0, log.read_text()

    def accepted(self):
        """How many tasks the sandbox has billed."""
        bill = httpx.get(f"{self.names['FLUX_KONTEXT_BASE_URL']}/sandbox/bill", trust_env=False)
        return bill.json()["accepted"]

    def ask_prefect(self, path, asked=None):
        """What Prefect's API says."""
        url = f"{self.names['PREFECT_API_URL']}{path}"
        reply = httpx.request(
            "GET" if asked is None else "POST", url, json=asked, trust_env=False, timeout=30
        )
        return reply.raise_for_status().json()

    def stored(self, prefix):
        """The images of an output in the bucket, below the prefix."""
        place = f"shop/{prefix}/"
        names = (path.removeprefix(place) for path in self.bucket.find(place))
        return {name for name in names if name.endswith((".jpg", ".png")) and name[0] != "_"}


@contextlib.contextmanager
def playground(folder):
    """The playground, as its command starts and Ctrl-C stops it."""
    shutil.copytree(ROOT / "examples", folder / "examples")
    place = Playground(folder)
    with place.running("python examples/playground.py", "Ctrl-C stops all of it."):
        place.look_around()
        yield place
