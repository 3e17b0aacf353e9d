"""Invariants of a batch, checked from three independent sources and its reports.

The sources are the service's own list of accepted tasks, the ledger read as plain JSON files, and
the images. Nothing in here imports the ledger or the batch.
"""

import csv
import hashlib
import io
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from decimal import Decimal

import fsspec
from PIL import Image

from tests.chaos.plain_ledger import PlainLedger
from tests.chaos.report_checks import check_results


@dataclass
class Findings:
    problems: list[str] = field(default_factory=list)
    rows: int = 0
    stored: int = 0
    failed: int = 0
    unknown: int = 0
    paid_twice: int = 0
    lost: int = 0
    missing: int = 0
    left_behind: int = 0
    paid: Decimal = Decimal(0)
    on_record: Decimal = Decimal(0)
    recorded: Decimal = Decimal(0)
    doubtful: Decimal = Decimal(0)
    keys: Counter = field(default_factory=Counter)

    def __str__(self):
        return "; ".join(self.problems) or "no problems"


def read_all(url):
    """Read every file below an output; return the contents by name."""
    fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    fs.invalidate_cache()
    root = root.rstrip("/")
    return {path[len(root) + 1 :]: fs.cat_file(path) for path in fs.find(root)}


def check(rows, records, output, origin=None, *, canary=None, killed=True, complete=True):
    """Check the invariants I1 to I6 of a batch.

    Args:
        rows: The manifest: (id, prompt), where equal prompts are equal rows.
        records: The service's accepted tasks.
        output: URL of the output.
        origin: Returns the bytes that the service serves for a task id; None skips that check.
        canary: An API key that no file may contain.
        killed: Whether hidden helper files may be left, as `kill -9` leaves them.
        complete: Whether no row may be outstanding or unsubmitted.
    """
    found = Findings(rows=len(rows))
    files = read_all(output)
    ledger = PlainLedger.read(
        {
            name.removeprefix("_ledger/"): data
            for name, data in files.items()
            if name.startswith("_ledger/") and not name.endswith(".part")
        }
    )
    by_prompt = {
        attempts[0].intent["request"]["prompt"]: key for key, attempts in ledger.attempts.items()
    }
    tasks = defaultdict(list)
    for record in records:
        tasks[record["prompt"]].append(record)
    for prompt, accepted in tasks.items():
        if prompt not in by_prompt:
            found.lost += len(accepted)
            found.problems.append(f"{prompt!r} is paid for but in no record")
    for prompt, key in by_prompt.items():
        _check_money(found, ledger, key, tasks[prompt])
        _check_named(found, ledger, key, tasks[prompt])
    if found.paid != found.on_record:
        found.problems.append(f"${found.paid} were paid, ${found.on_record} are on record")
    found.problems += [f"{name} was paid for without an intent" for name in ledger.without_intent]
    expected = {"failed.csv", "results.jsonl", "results.parquet", "gallery.html"}
    for row_id, prompt in rows:
        key = by_prompt.get(prompt)
        # The second name is used if a row of another manifest has the same id.
        names = [
            f"{name}.{kind}"
            for name in (row_id, f"{row_id}~{str(key)[:8]}")
            for kind in ("jpg", "png", "webp")
        ]
        expected.update(names)
        images = [files[name] for name in names if name in files]
        _check_row(found, ledger.attempts.get(key), images, row_id, complete)
    for key, attempts in ledger.attempts.items():
        expected |= _check_images(found, key, attempts[-1], files, origin)
    check_results(found, files, ledger, rows, complete)
    _check_files(found, files, expected, canary, killed)
    return found


def _check_files(found, files, expected, canary, killed):
    for name, data in files.items():
        if canary and canary.encode() in data:
            found.problems.append(f"the API key is in {name}")
        if name.endswith(".part") or ".probe-" in name:
            found.left_behind += 1
            if not killed:
                found.problems.append(f"a temporary file is left: {name}")
        elif not name.startswith(("_ledger/", "_results/", "_gallery/")) and name not in expected:
            found.problems.append(f"{name} is unexpected")


def _check_money(found, ledger, key, tasks):
    attempts = ledger.attempts[key]
    ours = {a.posted["task_id"] for a in attempts if a.posted and a.posted.get("task_id")}
    given_up = sum(a.given_up for a in attempts)
    doubtful = sum(a.posted is None and a.ended is None for a in attempts)
    failed = sum(a.ended is not None and a.ended["state"] == "failed" for a in attempts)
    unaccounted = [task for task in tasks if task["taskId"] not in ours]
    # An outage may prevent the record of an accepted task whose image is then stored.
    ended = {a.ended["task_id"] for a in attempts if a.ended}
    unaccounted = [task for task in unaccounted if task["taskId"] not in ended]
    found.paid += sum(Decimal(task["price"]) for task in tasks)
    found.on_record += sum(Decimal(task["price"]) for task in unaccounted)
    recorded = sum(a.price for a in attempts if a.accepted)
    found.on_record += recorded
    found.recorded += recorded
    state = attempts[-1].state
    found.keys[state] += 1
    if state == "unknown":
        found.doubtful += attempts[-1].price
    if len(tasks) > 1 + failed + given_up:
        found.paid_twice += len(tasks) - 1 - failed - given_up
        found.problems.append(f"{key} is paid for {len(tasks)} times")
    if len(unaccounted) > given_up + doubtful:
        found.lost += len(unaccounted) - given_up - doubtful
        found.problems.append(f"{key}: the ledger does not know {unaccounted}")
    for attempt in attempts[:-1]:
        if attempt.posted is None and attempt.ended is None:
            found.problems.append(f"{key} was paid for again while an attempt was unknown")
    if invented := ours - {task["taskId"] for task in tasks}:
        found.problems.append(f"{key}: the service does not know {invented}")


def _check_named(found, ledger, key, tasks):
    """Check that unfinished rows are in an open wave, and ended ones in a wave or wave file."""
    last = ledger.attempts[key][-1]
    line = ledger.in_wave_files.get(key)
    if key in ledger.in_open_waves:
        return
    if last.ended is None and (last.posted is None or last.posted["state"] == "accepted"):
        found.lost += bool(tasks)
        found.problems.append(f"{key} is outstanding, and no unfinished wave names it")
    if last.ended is not None and (line is None or line["ended"]["state"] != last.ended["state"]):
        found.problems.append(f"{key} has ended, but neither an open wave nor a wave file has it")
    if line is not None and last.ended is not None:
        paid = sum(a.price for a in ledger.attempts[key] if a.accepted)
        if abs(line["spent"] - float(paid)) > 1e-9:
            found.problems.append(
                f"{key}: its wave file says ${line['spent']}, its records ${paid}"
            )


def _check_row(found, attempts, images, row_id, complete):
    if attempts is None:
        if complete:
            found.missing += 1
            found.problems.append(f"row {row_id} has no record at all")
        return
    last = attempts[-1]
    if last.ended is not None and last.ended["state"] == "stored":
        found.stored += 1
        sha256 = last.ended["images"][0]["sha256"]
        if complete and sha256 not in map(_sha256, images):
            found.missing += 1
            found.problems.append(f"row {row_id} is stored but has no image")
    elif last.ended is not None or (last.posted and last.posted["state"] == "rejected"):
        found.failed += 1
        if not (last.ended or last.posted).get("reason"):
            found.problems.append(f"row {row_id} failed without a reason")
    elif last.posted is None:
        found.unknown += 1
    elif complete:
        found.missing += 1
        found.problems.append(f"row {row_id} is paid for but not collected")


def _check_images(found, key, attempt, files, origin):
    if attempt.ended is None or attempt.ended["state"] != "stored":
        return set()
    for name, image in zip(attempt.ended["files"], attempt.ended["images"], strict=True):
        data = files.get(name)
        if data is None:
            found.lost += 1
            found.problems.append(f"{key}: {name} is gone")
            continue
        pixels = _pixels(data)
        if (_sha256(data), len(data)) != (image["sha256"], image["size"]):
            found.lost += 1
            found.problems.append(f"{key}: {name} is not what was stored")
        # The stored image has an AI mark in its metadata, so only pixels are compared.
        if origin is not None and pixels != _pixels(
            origin(attempt.ended["task_id"], image["format"])
        ):
            found.problems.append(f"{key}: {name} is not what the service serves")
    return set(attempt.ended["files"])


def ids_in(failed_csv):
    """Return the ids in a `failed.csv`."""
    return [line["id"] for line in csv.DictReader(io.StringIO(failed_csv.decode()))]


def _pixels(data):
    if data is None:
        return None
    with Image.open(io.BytesIO(data)) as picture:
        return picture.size, picture.convert("RGB").tobytes()


def _sha256(data):
    return hashlib.sha256(data).hexdigest()
