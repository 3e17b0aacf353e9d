"""A batch in separate processes that can be killed, beside a sandbox that counts the money."""

import contextlib
import csv
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import httpx

from prefect_flux_kontext.sandbox.faults.plan import FaultPlan
from tests.chaos import child
from tests.chaos.checker import check

KEY = "canary-7f3a9c51e2d84b06"
_MAX_SECONDS = 600
_ROOT = Path(__file__).parents[2]

# Processes are forked from a server with all imports done, so a start takes milliseconds.
_fork = multiprocessing.get_context("forkserver")
_fork.set_forkserver_preload(
    [
        "tests.chaos.child",
        "s3fs",
        "rich.progress",
        "prefect_flux_kontext.batch.runner",
        "prefect_flux_kontext.settings",
        "prefect_flux_kontext.manifest.reader",
    ]
)


@dataclass
class Ended:
    """An ended process: its exit status (negative for a signal) and its output."""

    status: int
    said: str


class _Unshared:
    """A process in a PID namespace of its own, with the methods of a multiprocessing process."""

    def __init__(self, *arguments):
        command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
        module = ["-m", "tests.chaos.child", json.dumps(arguments)]
        self._outside = subprocess.Popen(
            [*command, sys.executable, *module], cwd=_ROOT, stderr=subprocess.DEVNULL
        )
        self.pid = self._find_child()

    def _find_child(self):
        children = Path(f"/proc/{self._outside.pid}/task/{self._outside.pid}/children")
        while not (found := children.read_text().split()):
            time.sleep(0.002)
        return int(found[0])

    def join(self, seconds=None):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._outside.wait(seconds)

    def is_alive(self):
        return self._outside.poll() is None

    def kill(self):
        self._outside.kill()

    @property
    def exitcode(self):
        return self._outside.returncode

    def close(self):
        pass


class Started:
    """A process that runs a command."""

    def __init__(self, process, log):
        self._process = process
        self._log = log
        self.pid = process.pid

    def send(self, number):
        """Send the process a signal, if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def lives_for(self, seconds):
        """Wait for at most so long; return whether the process still runs."""
        self._process.join(seconds)
        return self._process.is_alive()

    def end(self):
        """Wait until the process has ended."""
        if self.lives_for(_MAX_SECONDS):
            self._process.kill()
            self._process.join()
            raise AssertionError(f"the process hangs:\n{self.said()}")
        status = self._process.exitcode
        self._process.close()
        return Ended(status, self.said())

    def kill(self):
        """Send `kill -9` and wait until the process has ended."""
        self.send(signal.SIGKILL)
        return self.end()

    def said(self):
        return self._log.read_text() if self._log.exists() else ""


@contextlib.contextmanager
def without_faults(service):
    """Switch faults off inside the block, in which no request is counted."""
    faults = service.active_faults
    plan, numbers = faults.plan, faults.numbers.copy()
    faults.plan = FaultPlan()
    yield
    faults.plan, faults.numbers = plan, numbers


class Batch:
    """A manifest, an output and the service, and the commands on them.

    Args:
        service: The sandbox, as `running_sandbox` gives it.
        folder: For the manifest and the logs.
        output: Where images go.
        environment: Further variables of the processes.
    """

    def __init__(self, service, folder, output=None, **environment):
        self.service = service
        self.folder = Path(folder)
        self.output = output or str(self.folder / "out")
        self.manifest = self.folder / "manifest.csv"
        self.kills = 0
        self.lines = []
        self._logs = 0
        self.environment = {
            "FLUX_KONTEXT_BASE_URL": service.url,
            "FLUX_KONTEXT_API_KEY": KEY,
            "FLUX_KONTEXT_POLL_INITIAL_DELAY": "0.05",
            "FLUX_KONTEXT_POLL_INTERVAL": "0.1",
            "FLUX_KONTEXT_CONCURRENT_SUBMITS": "8",
            "FLUX_KONTEXT_REQUESTS_PER_MINUTE": "1000000",
            **environment,
        }

    def write(self, lines, name="manifest.csv"):
        """Write a manifest of (id, prompt); rows of earlier manifests are still checked."""
        path = self.folder / name
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "prompt"])
            writer.writerows(lines)
        self.lines = list(dict.fromkeys([*self.lines, *lines]))
        return path

    def start(
        self,
        *command,
        kill_point=None,
        file_limit=None,
        clock=None,
        namespace=False,
        **environment,
    ):
        self._logs += 1
        log = self.folder / f"log-{self._logs}.txt"
        arguments = (
            list(map(str, command)),
            self.environment | environment,
            str(log),
            kill_point,
            file_limit,
            clock,
        )
        if namespace:
            return Started(_Unshared(*arguments), log)
        process = _fork.Process(target=child.main, args=arguments)
        process.start()
        return Started(process, log)

    def start_run(self, *options, **how):
        return self.start("run", self.manifest, self.output, *options, **how)

    def run(self, *options, **how):
        return self.start_run(*options, **how).end()

    def command(self, name, *options, **how):
        """Run `collect`, `status`, `resolve` or `retry-failed` on the output."""
        return self.start(name, self.output, *options, **how).end()

    def run_and_kill(self, after, *options, **how):
        """Start a run and send `kill -9` after some seconds, unless it has ended before."""
        running = self.start_run(*options, **how)
        if running.lives_for(after):
            self.kills += 1
            return running.kill()
        return running.end()

    @property
    def accepted(self):
        return self.service.service.bill()["accepted"]

    @property
    def billed(self):
        """Dollars that the service has billed for the rows of this batch."""
        return sum((Decimal(record["price"]) for record in self._records()), Decimal(0))

    def _records(self):
        # Batches of one test may share the service; each has prompts of its own.
        prompts = {prompt for _, prompt in self.lines}
        return [record for record in self.service.service.records() if record["prompt"] in prompts]

    def check(self, **how):
        """Check the invariants of the batch."""
        records = self._records()
        with without_faults(self.service), httpx.Client(trust_env=False, verify=False) as http:

            def origin(task_id, kind):
                # A result of another format than requested is served as JPEG under its usual name.
                ending = "png" if kind == "png" else "jpg"
                return http.get(f"{self.service.url}/results/{task_id}/1.{ending}").content

            return check(self.lines, records, self.output, origin, canary=KEY, **how)

    def until_or_ended(self, condition, running):
        """Wait until the condition is met or the process has ended."""
        while not condition() and running.lives_for(0.002):
            pass

    def until(self, condition, running, seconds=30):
        """Wait until the condition is met, while the process runs."""
        end = time.monotonic() + seconds
        while not condition():
            assert running.lives_for(0.002), running.said()
            assert time.monotonic() < end, running.said()
