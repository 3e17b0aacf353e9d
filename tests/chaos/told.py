"""Whether what a batch tells of itself is so: result manifest, summary, exit status, `status`.

Each is read as anybody would read it, and compared with the bill, the ledger and the files.
"""

import hashlib
import io
import json
import re
from dataclasses import dataclass
from decimal import Decimal

import pyarrow.parquet as pq

_SUMMARY = re.compile(
    r"^(?:flux-kontext: .*Until then: )?(\d+) of (\d+) rows stored(.*)$", re.MULTILINE
)
_FIGURES = {
    "failed": r"; (\d+) failed",
    "unknown": r"; (\d+) unknown",
    "outstanding": r"; (\d+) outstanding",
    "not_submitted": r"; (\d+) not submitted",
    "already": r", (\d+) of them before this run",
}
_SPENT = re.compile(r"; \$([\d.]+) spent")
_IN_STATUS = re.compile(r"^ *(\$?)([\d,.]+)  (\w+)", re.MULTILINE)


@dataclass
class Summary:
    """The figures in the last line of a run."""

    rows: int
    stored: int
    failed: int
    unknown: int
    outstanding: int
    not_submitted: int
    already: int
    spent: Decimal


def summary_in(said):
    """The summary that a run has printed, or None for one that has not got so far."""
    lines = _SUMMARY.findall(said)
    if not lines:
        return None
    stored, rows, rest = lines[-1]
    figures = {
        name: int(found[1]) if (found := re.search(pattern, rest)) else 0
        for name, pattern in _FIGURES.items()
    }
    spent = _SPENT.search(rest)
    return Summary(int(rows), int(stored), **figures, spent=Decimal(spent[1] if spent else 0))


def check_summary(found, ended, billed):
    """A run that has ended in fine weather has told what is so, and by its exit status too.

    Args:
        found: The findings right after that run; what is wrong is added.
        ended: The run.
        billed: Dollars that were billed while it ran.
    """
    told = summary_in(ended.said)
    if told is None:
        found.problems.append(f"a run has told no summary: {ended.said[-500:]}")
        return
    so = Summary(
        rows=found.rows,
        stored=found.stored,
        failed=found.failed,
        unknown=found.unknown,
        outstanding=0,
        not_submitted=0,
        already=told.already,
        spent=billed,
    )
    if told != so:
        found.problems.append(f"a run has told {told}, and so it is: {so}")
    if ended.status != (0 if told.stored == told.rows else 1):
        found.problems.append(f"a run with {told} has ended with status {ended.status}")


def check_summary_in_bad_weather(found, ended, billed, rows):
    """A run has told of each row once, and of the money what it could know."""
    told = summary_in(ended.said)
    if told is None:
        return  # it could not reach its end, and has said why
    counted = told.stored + told.failed + told.unknown + told.outstanding + told.not_submitted
    if counted != told.rows or told.rows > rows:
        found.problems.append(f"a run in bad weather has told {told} of {rows} rows")
    most = told.spent + told.unknown * Decimal("0.03")
    if not told.spent <= billed <= most:
        found.problems.append(
            f"a run in bad weather has told {told}, and ${billed} were billed meanwhile"
        )


def check_status(found, said):
    """`flux-kontext status` has told rows and dollars as they are."""
    told = {
        f"{dollar}{what}": Decimal(number.replace(",", ""))
        for dollar, number, what in _IN_STATUS.findall(said)
    }
    so = {state: Decimal(number) for state, number in found.keys.items() if number}
    so["$spent"] = found.recorded
    if found.doubtful:
        so["$more"] = found.doubtful
    if told != so:
        found.problems.append(f"`status` tells {told}, and so it is: {so}")


def check_results(found, files, ledger, rows, complete):
    """The result manifest has each row once, and tells of each what the ledger does.

    Args:
        found: What is wrong is added to it.
        files: All files of the output, by name.
        ledger: The plain ledger.
        rows: The batch's rows: (id, prompt).
        complete: Whether the last run has come to its end.
    """
    lines = [json.loads(line) for line in files.get("results.jsonl", b"").splitlines()]
    if len({line["id"] for line in lines}) < len(lines):
        found.problems.append("the result manifest has a row twice")
    for line in lines:
        if line["state"] == "stored":
            ended = (
                ledger.attempts[line["key"]][-1].ended if line["key"] in ledger.attempts else {}
            )
            if not ended or ended["images"][0]["sha256"] != line["sha256"]:
                found.problems.append(f"the result manifest makes up an image of {line['id']}")
            if hashlib.sha256(files.get(line["file"], b"")).hexdigest() != line["sha256"]:
                found.problems.append(f"{line['file']} is not what the result manifest says")
    if complete:
        _check_all_told(found, lines, ledger, rows)
        if left := [name for name in files if name.startswith("_results/parts/")]:
            found.problems.append(f"parts of the result manifest are left: {left}")
        _check_parquet(found, files.get("results.parquet"), lines)


def _check_all_told(found, lines, ledger, rows):
    if missing := {row_id for row_id, _ in rows} ^ {line["id"] for line in lines}:
        found.problems.append(f"the result manifest has not, or has besides, {sorted(missing)}")
    prices = {}
    for line in lines:
        attempts = ledger.attempts.get(line.get("key"))
        if attempts is None:
            found.problems.append(f"the result manifest makes up a key of {line['id']}")
            continue
        state, spent = attempts[-1].state, sum(a.price for a in attempts if a.accepted)
        prices[line["key"]] = Decimal(str(line.get("cost_usd", 0)))
        if line["state"] != state or prices[line["key"]] != spent:
            found.problems.append(
                f"the result manifest says of {line['id']} {line['state']} for "
                f"${prices[line['key']]}, the ledger {state} for ${spent}"
            )
    # A row that asks for something else by now has one line, and in the ledger two keys.
    moved = len({row_id for row_id, _ in rows}) < len(rows)
    if sum(prices.values()) != found.recorded and not moved:
        found.problems.append(
            f"the result manifest's prices make ${sum(prices.values())}, the ledger's "
            f"${found.recorded}"
        )


def _check_parquet(found, data, lines):
    if data is None:
        found.problems.append("there is no results.parquet")
        return
    names = ("id", "state", "key", "sha256", "file", "attempts", "prompt")
    table = pq.read_table(io.BytesIO(data)).to_pylist()
    costs = [row["cost_usd"] for row in table]
    if [{name: row.get(name) for name in names} for row in table] != [
        {name: line.get(name) for name in names} for line in lines
    ] or costs != [_decimal(line.get("cost_usd")) for line in lines]:
        found.problems.append("results.parquet and results.jsonl differ")


def _decimal(number):
    return None if number is None else Decimal(str(number))
