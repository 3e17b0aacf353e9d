"""Checks of a batch's reports: result manifest, summary, exit status and `status`.

Each is read as a user would read it, and compared with the bill, the ledger and the files.
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
_STATUS_LINE = re.compile(r"^ *(\$?)([\d,.]+)  (\w+)", re.MULTILINE)


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


def parse_summary(said):
    """Parse the summary that a run has printed; None if it ended before printing one."""
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
    """Check the summary and exit status of a run that ended without active faults.

    Args:
        found: The findings right after that run; problems are added.
        ended: The run.
        billed: Dollars that were billed while it ran.
    """
    reported = parse_summary(ended.said)
    if reported is None:
        found.problems.append(f"a run printed no summary: {ended.said[-500:]}")
        return
    expected = Summary(
        rows=found.rows,
        stored=found.stored,
        failed=found.failed,
        unknown=found.unknown,
        outstanding=0,
        not_submitted=0,
        already=reported.already,
        spent=billed,
    )
    if reported != expected:
        found.problems.append(f"a run reported {reported}, expected {expected}")
    if ended.status != (0 if reported.stored == reported.rows else 1):
        found.problems.append(f"a run that reported {reported} ended with status {ended.status}")


def check_summary_under_faults(found, ended, billed, rows):
    """Check that a run under faults counted each row once, and all the money it could know of."""
    reported = parse_summary(ended.said)
    if reported is None:
        return  # it stopped before its end, with an error
    counted = (
        reported.stored
        + reported.failed
        + reported.unknown
        + reported.outstanding
        + reported.not_submitted
    )
    if counted != reported.rows or reported.rows > rows:
        found.problems.append(f"a run under faults reported {reported} of {rows} rows")
    most = reported.spent + reported.unknown * Decimal("0.03")
    if not reported.spent <= billed <= most:
        found.problems.append(
            f"a run under faults reported {reported}, but ${billed} were billed meanwhile"
        )


def check_status(found, said):
    """Check the rows and dollars that `flux-kontext status` reports."""
    reported = {
        f"{dollar}{what}": Decimal(number.replace(",", ""))
        for dollar, number, what in _STATUS_LINE.findall(said)
    }
    expected = {state: Decimal(number) for state, number in found.keys.items() if number}
    expected["$spent"] = found.recorded
    if found.doubtful:
        expected["$more"] = found.doubtful
    if reported != expected:
        found.problems.append(f"`status` reports {reported}, expected {expected}")


def check_results(found, files, ledger, rows, complete):
    """Check that the result manifest has each row once, and agrees with the ledger.

    Args:
        found: The findings; problems are added.
        files: All files of the output, by name.
        ledger: The plain ledger.
        rows: The batch's rows: (id, prompt).
        complete: Whether the last run ran to its end.
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
                found.problems.append(f"the result manifest invents an image of {line['id']}")
            if hashlib.sha256(files.get(line["file"], b"")).hexdigest() != line["sha256"]:
                found.problems.append(f"{line['file']} is not what the result manifest says")
    if complete:
        _check_all_rows(found, lines, ledger, rows)
        if left := [name for name in files if name.startswith("_results/parts/")]:
            found.problems.append(f"parts of the result manifest are left: {left}")
        _check_parquet(found, files.get("results.parquet"), lines)


def _check_all_rows(found, lines, ledger, rows):
    if missing := {row_id for row_id, _ in rows} ^ {line["id"] for line in lines}:
        found.problems.append(f"the result manifest misses, or has in addition, {sorted(missing)}")
    prices = {}
    for line in lines:
        attempts = ledger.attempts.get(line.get("key"))
        if attempts is None:
            found.problems.append(f"the result manifest invents a key of {line['id']}")
            continue
        state, spent = attempts[-1].state, sum(a.price for a in attempts if a.accepted)
        prices[line["key"]] = Decimal(str(line.get("cost_usd", 0)))
        if line["state"] != state or prices[line["key"]] != spent:
            found.problems.append(
                f"the result manifest says of {line['id']} {line['state']} for "
                f"${prices[line['key']]}, the ledger {state} for ${spent}"
            )
    # A row whose prompt has changed has one line, but two keys in the ledger.
    moved = len({row_id for row_id, _ in rows}) < len(rows)
    if sum(prices.values()) != found.recorded and not moved:
        found.problems.append(
            f"the result manifest's prices sum to ${sum(prices.values())}, the ledger's "
            f"${found.recorded}"
        )


def _check_parquet(found, data, lines):
    if data is None:
        found.problems.append("results.parquet is missing")
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
