"""Running the commands of the examples' README in a shell, against the playground."""

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
"""All commands in the README."""

_TIMEOUT_SECONDS = 60


def wait_until(condition, what):
    """Wait for a condition to be true, and return its value."""
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline, f"still waiting for {what}"
        time.sleep(0.1)
    return found


class Playground:
    """A copy of the examples in an empty folder, with the playground running.

    Attributes:
        folder: Where the commands are run.
        variables: The variables that `playground/environment` sets.
        bucket: The filesystem of the playground's S3.
    """

    def __init__(self, folder):
        self.folder = folder
        home = folder / "home"
        home.mkdir()
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self._environment = {
            "PATH": path,
            "HOME": str(home),
            "PYTHONPATH": str(ROOT),
            "DO_NOT_TRACK": "1",
            "PYTHONUNBUFFERED": "1",
        }

    def read_environment(self):
        """Read `playground/environment`, and connect to the bucket."""
        text = (self.folder / "playground" / "environment").read_text()
        self.variables = dict(re.findall(r"^export (\w+)='(.*)'$", text, re.MULTILINE))
        options = {
            name: self.variables[f"FSSPEC_S3_{name.upper()}"]
            for name in ("endpoint_url", "key", "secret")
        }
        self.bucket = fsspec.filesystem("s3", use_listings_cache=False, **options)

    def run(self, command):
        """Run a command of the README that succeeds, and return its output."""
        assert command in COMMANDS
        shell = f". playground/environment && exec {command}"
        done = subprocess.run(
            ["/bin/sh", "-c", shell],
            cwd=self.folder,
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @contextlib.contextmanager
    def running(self, command, ready_text):
        """Run a command of the README, yield once it prints a text, and end it with Ctrl-C."""
        assert command in COMMANDS
        has_environment = (self.folder / "playground" / "environment").exists()
        log = self.folder / f"{command.split()[1].replace('/', '-')}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [
                    "/bin/sh",
                    "-c",
                    ". playground/environment && " * has_environment + f"exec {command}",
                ],
                cwd=self.folder,
                env=self._environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                wait_until(
                    lambda: ready_text in log.read_text() or process.poll() is not None, command
                )
                assert process.poll() is None, log.read_text()
                yield
            finally:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(_TIMEOUT_SECONDS)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            assert process.returncode == 0, log.read_text()

    def count_billed(self):
        """Return how many tasks the sandbox has billed."""
        bill = httpx.get(
            f"{self.variables['FLUX_KONTEXT_BASE_URL']}/sandbox/bill", trust_env=False
        )
        return bill.json()["accepted"]

    def ask_prefect(self, path, body=None):
        """Return a response of Prefect's API."""
        url = f"{self.variables['PREFECT_API_URL']}{path}"
        reply = httpx.request(
            "GET" if body is None else "POST", url, json=body, trust_env=False, timeout=30
        )
        return reply.raise_for_status().json()

    def list_images(self, prefix):
        """Return the names of the images below a prefix of the bucket."""
        folder = f"shop/{prefix}/"
        names = (path.removeprefix(folder) for path in self.bucket.find(folder))
        return {name for name in names if name.endswith((".jpg", ".png")) and name[0] != "_"}


@contextlib.contextmanager
def playground(folder):
    """Run the playground with its own command, and stop it with Ctrl-C."""
    shutil.copytree(ROOT / "examples", folder / "examples")
    place = Playground(folder)
    with place.running("python examples/playground.py", "Press Ctrl-C to stop."):
        place.read_environment()
        yield place
