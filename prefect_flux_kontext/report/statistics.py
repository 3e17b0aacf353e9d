"""The statistics of an output, counted line by line from its result manifest."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from prefect_flux_kontext.storage.temp_db import DuplicateIndex, hash_name

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from prefect_flux_kontext.report.results import Line

# Lines whose keys are looked up together.
_BLOCK_LINES = 250

# Keeps the bars of the gallery's histograms legible.
_MAX_BARS = 24

# Round widths of a bar, in seconds.
_BAR_WIDTHS_SECONDS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1_800, 3_600)


@dataclass
class _Run:
    """The images that a run stored, with its first submit and its last finish."""

    images: int = 0
    first_submitted_at: str = "~"  # later than any timestamp
    last_finished_at: str = ""


@dataclass
class Statistics:
    """The statistics of a result manifest; equal rows are paid for once."""

    states: Counter[str] = field(default_factory=Counter)
    cost_usd: float = 0.0
    tenths: dict[str, Counter[int]] = field(
        default_factory=lambda: {"waiting": Counter(), "generation": Counter()}
    )
    runs: dict[str, _Run] = field(default_factory=dict)
    latest: tuple[str, str] = ("", "")

    def count(self, lines: Iterable[Line], paid_before: Collection[int] = ()) -> Iterator[Line]:
        """Count lines and yield them unchanged.

        Args:
            lines: The lines.
            paid_before: What `hash_payment` gives for lines that are counted already.
        """
        lines, number = iter(lines), 0
        with DuplicateIndex() as paid:
            while block := list(itertools.islice(lines, _BLOCK_LINES)):
                costly = [line for line in block if line.get("cost_usd")]
                numbers = range(number, number + len(costly))
                number += len(costly)
                firsts = paid.add_all((str(line.get("key")) for line in costly), numbers)
                for line, first, own in zip(costly, firsts, numbers, strict=True):
                    if first == own and not (paid_before and hash_payment(line) in paid_before):
                        self.cost_usd += line["cost_usd"]
                for line in block:
                    self._count_line(line)
                    yield line

    def summarize(self) -> dict[str, Any]:
        """Return the statistics as the gallery's page takes them, ready for JSON."""
        run = self.runs.get(self.latest[1])
        seconds = _seconds_between(run.first_submitted_at, run.last_finished_at) if run else None
        return {
            "states": dict(self.states),
            "costUsd": round(self.cost_usd, 6),
            "seconds": seconds,
            "imagesPerSecond": run.images / seconds if run and seconds else None,
            "recordedAt": self.latest[0] or None,
            "times": {name: _build_histogram(tenths) for name, tenths in self.tenths.items()},
        }

    def _count_line(self, line: Line) -> None:
        self.states[line["state"]] += 1
        self.latest = max(self.latest, (line["recorded_at"], line["run"]))
        if line["state"] != "stored" or line.get("stored_before"):
            return
        for name, tenths in self.tenths.items():
            if (seconds := line.get(f"{name}_seconds")) is not None:
                tenths[round(seconds * 10)] += 1
        if "submitted_at" in line and "finished_at" in line:
            run = self.runs.setdefault(line["run"], _Run())
            run.images += 1
            run.first_submitted_at = min(run.first_submitted_at, line["submitted_at"])
            run.last_finished_at = max(run.last_finished_at, line["finished_at"])


def hash_payment(line: Line) -> int:
    """Return a hash of the row key of a line that cost something, and 0 for another line."""
    return hash_name(str(line.get("key")).encode()) if line.get("cost_usd") else 0


def _seconds_between(first: str, last: str) -> float:
    span = datetime.fromisoformat(last) - datetime.fromisoformat(first)
    return max(0.0, span.total_seconds())


def _build_histogram(tenths: Counter[int]) -> dict[str, Any] | None:
    """Return at most 24 bars of equal width, in seconds, with the median and 95th percentile."""
    if not tenths:
        return None
    low, high = min(tenths) / 10, max(tenths) / 10
    width = next(
        (width for width in _BAR_WIDTHS_SECONDS if (high - low) / width < _MAX_BARS - 1), 0
    )
    width = width or math.ceil((high - low) / (_MAX_BARS - 1))
    start = math.floor(low / width) * width
    bars = [0] * (math.floor((high - start) / width + 1e-9) + 1)
    for tenth, number in tenths.items():
        bars[math.floor((tenth / 10 - start) / width + 1e-9)] += number
    return {
        "start": round(start, 3),
        "width": width,
        "bars": bars,
        "median": _percentile(tenths, 0.5),
        "p95": _percentile(tenths, 0.95),
    }


def _percentile(tenths: Counter[int], share: float) -> float:
    left = share * tenths.total()
    for tenth in sorted(tenths):
        left -= tenths[tenth]
        if left <= 0:
            break
    return tenth / 10
