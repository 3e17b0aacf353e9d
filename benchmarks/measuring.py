"""Runs of a piece of work, each against a sandbox of its own, and what was measured.

python benchmarks/measuring.py bare 100    # a single run of a piece of work
"""

from __future__ import annotations

import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from prefect_flux_kontext.cli.prefect_server import prefect_server

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

WORK = Path(__file__).with_name("work.py")
UNLIMITED = 1_000_000
WITH_PREFECT = ("flow", "mapped")
"""Work that a Prefect server records."""

_PLACES = tempfile.TemporaryDirectory()
"""Where the runs' files are until all is measured; images are emptied sooner. On ext4 without a
journal each new file is looked for behind all that were removed in the last minutes: after the
removal of a run's 16,000, creating one takes 0.5 ms instead of 0.02."""


@dataclass(frozen=True)
class Account:
    """The sandbox's settings and the cadence that goes with them; `slots` are the client's too."""

    mean: float = 30.0
    slots: int = 1_000
    requests: int = 10_000
    long_edge: int = 96
    gallery: int = 10_000

    @property
    def environment(self) -> dict[str, str]:
        """The account for the work's process."""
        return {
            "FLUX_KONTEXT_API_KEY": "sandbox",
            "FLUX_KONTEXT_CONCURRENT_TASKS": str(self.slots),
            "FLUX_KONTEXT_REQUESTS_PER_MINUTE": str(self.requests),
            "FLUX_KONTEXT_POLL_INITIAL_DELAY": str(self.mean * 2 / 3),
            "FLUX_KONTEXT_POLL_INTERVAL": str(max(0.01, self.mean / 10)),
            "FLUX_KONTEXT_GALLERY_IMAGES": str(self.gallery),
            "PREFECT_LOGGING_LEVEL": "ERROR",
        }


@contextmanager
def sandbox(account: Account) -> Iterator[str]:
    """A sandbox in a process of its own; yields its URL."""
    command = [
        *(sys.executable, "-m", "prefect_flux_kontext", "sandbox", "--port", "0"),
        *("--mean", str(account.mean), "--slots", str(account.slots)),
        *("--requests-per-minute", str(account.requests)),
        *("--long-edge", str(account.long_edge), "--balance", "1000000"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
    finally:
        process.terminate()
        process.wait()


def work(name: str, account: Account, images: int, *, kind: str = "jpeg") -> dict[str, float]:
    """One run of a piece of work against a new sandbox; returns all figures."""
    with sandbox(account) as url:
        folder = Path(tempfile.mkdtemp(dir=_PLACES.name))
        with (folder / "manifest.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "image", "prompt", "aspect_ratio", "output_format"])
            image = f"{url}/references/cat.png"  # one reference and style: painted once
            rows = ([f"row-{n:06}", image, f"oil, take {n}", "16:9", kind] for n in range(images))
            writer.writerows(rows)
        environment = {**os.environ, **account.environment, "FLUX_KONTEXT_BASE_URL": url}
        command = [sys.executable, str(WORK), name, str(folder)]
        measured: dict[str, float]
        if name in WITH_PREFECT:
            with prefect_server(folder / "prefect") as server:
                done = run(command, {**environment, **server.environment})
                measured = json.loads(done) | recorded(server.url)
        else:
            measured = json.loads(run(command, environment))
        if measured["stored"] != images:
            raise SystemExit(f"{name}: {measured['stored']} of {images} images were stored")
        measured["files"] = sum(path.is_file() for path in folder.glob("out/_ledger/**/*"))
        for image in folder.glob("out/*.*"):
            os.truncate(image, 0)
        return measured | seen_by_the_service(url, account, images)


def run(command: Sequence[str], environment: dict[str, str]) -> str:
    """The last line that a process prints."""
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()[-1]


def recorded(url: str) -> dict[str, float]:
    """Task runs and events that the Prefect server has recorded."""
    time.sleep(5)  # the last events are under way
    with httpx.Client(base_url=f"{url}/api", timeout=60) as http:
        runs = http.post("/task_runs/count", json={}).json()
        events = http.post("/events/filter", json={"limit": 1}).json()["total"]
    return {"task_runs": runs, "events": events}


def seen_by_the_service(url: str, account: Account, images: int) -> dict[str, float]:
    """What the sandbox's bill says, and what its slots did from the first filling on."""
    bill = httpx.get(f"{url}/sandbox/bill").json()
    lines = httpx.get(f"{url}/sandbox/tasks", timeout=60).text.splitlines()
    tasks = [
        (measured["accepted_at"], measured["ended_at"]) for measured in map(json.loads, lines)
    ]
    tasks = sorted((accepted / 1000, ended / 1000) for accepted, ended in tasks)
    first, last = tasks[min(account.slots, images // 2)][0], tasks[-1][0]
    seconds = max(0.001, last - first)
    busy = sum(min(end, last) - max(began, first) for began, end in tasks if end > first)
    submits_refused = sum(bill["submits_refused"].values())
    submits = images + submits_refused
    requests = submits + bill["status_requests"]
    return {
        "rate": sum(first < began for began, _ in tasks) / seconds,
        "slots_used": busy / seconds / account.slots,
        "requests": requests / images,
        "submits_refused": submits_refused / submits,
        "refused": (submits_refused + bill["statuses_refused"]) / requests,
        "peak_a_minute": bill["peak_requests_a_minute"],
    }


class Runs:
    """Runs that were made, kept in a file where one is named.

    Args:
        repeats: How often each piece of work is run.
        kept: A file of a line of JSON each; what it holds is not run again.
    """

    def __init__(self, repeats: int, kept: Path | None) -> None:
        self.repeats = repeats
        self._kept = kept
        self._made: list[tuple[str, dict[str, float]]] = []
        if kept is not None and kept.exists():
            for line in kept.read_text().splitlines():
                measured = json.loads(line)
                self._made.append((measured.pop("of"), measured))

    def medians(
        self,
        name: str,
        account: Account,
        images: int,
        *,
        kind: str = "jpeg",
        most: int = 1_000,
    ) -> dict[str, float]:
        """The median of each figure of a piece of work, and of how many `runs`.

        Args:
            name: The piece of work.
            account: The service, and the cadence.
            images: Rows of the manifest.
            kind: Format of the images.
            most: Runs at most, for what takes very long.
        """
        of = " ".join(map(str, (name, *asdict(account).values(), images, kind)))
        wanted = min(self.repeats, most)
        runs = [measured for other, measured in self._made if other == of][:wanted]
        while len(runs) < wanted:
            runs.append(work(name, account, images, kind=kind))
            measured = json.dumps(
                {"of": of} | {key: round(was, 5) for key, was in runs[-1].items()}
            )
            print(measured, file=sys.stderr)
            if self._kept is not None:
                with self._kept.open("a") as file:
                    file.write(measured + "\n")
        medians = {key: statistics.median(measured[key] for measured in runs) for key in runs[0]}
        return medians | {"runs": len(runs)}


if __name__ == "__main__":
    print(json.dumps(work(sys.argv[1], Account(mean=0.02), int(sys.argv[2]))))
