"""The numbers of an output, counted line by line from its result manifest."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from prefect_flux_kontext.manifest.duplicates import DuplicateIndex

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from prefect_flux_kontext.report.results import Line

_BARS = 24
_STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1_800, 3_600)


@dataclass
class _Run:
    images: int = 0
    first: str = "~"
    last: str = ""


@dataclass
class Statistics:
    """What a result manifest comes to.

    Attributes:
        states: Rows in each state.
        dollars: What they cost; equal rows are paid once.
        tenths: How many images took how many tenths of a second, by what took them.
    """

    states: Counter[str] = field(default_factory=Counter)
    dollars: float = 0.0
    tenths: dict[str, Counter[int]] = field(
        default_factory=lambda: {"waiting": Counter(), "generation": Counter()}
    )
    _runs: dict[str, _Run] = field(default_factory=dict)
    _latest: tuple[str, str] = ("", "")

    def counting(self, lines: Iterable[Line]) -> Iterator[Line]:
        """Pass lines on and count them."""
        with DuplicateIndex() as paid:
            for number, line in enumerate(lines, start=1):
                self._count(line)
                key = str(line.get("key"))
                if line.get("cost_usd") and paid.first(key.encode(), number) == number:
                    self.dollars += line["cost_usd"]
                yield line

    def _count(self, line: Line) -> None:
        self.states[line["state"]] += 1
        self._latest = max(self._latest, (line["recorded_at"], line["run"]))
        if line["state"] != "stored" or line.get("stored_before"):
            return
        for what, tenths in self.tenths.items():
            if (seconds := line.get(f"{what}_seconds")) is not None:
                tenths[round(seconds * 10)] += 1
        if "submitted_at" in line and "finished_at" in line:
            run = self._runs.setdefault(line["run"], _Run())
            run.images += 1
            run.first = min(run.first, line["submitted_at"])
            run.last = max(run.last, line["finished_at"])

    def told(self) -> dict[str, Any]:
        """All of it, as the page takes it."""
        run = self._runs.get(self._latest[1])
        seconds = _between(run.first, run.last) if run else None
        return {
            "states": dict(self.states),
            "dollars": round(self.dollars, 6),
            "seconds": seconds,
            "perSecond": run.images / seconds if run and seconds else None,
            "recorded": self._latest[0] or None,
            "times": {what: _histogram(tenths) for what, tenths in self.tenths.items()},
        }


def _between(first: str, last: str) -> float:
    span = datetime.fromisoformat(last) - datetime.fromisoformat(first)
    return max(0.0, span.total_seconds())


def _histogram(tenths: Counter[int]) -> dict[str, Any] | None:
    """At most 24 bars of one width, in seconds, and the median and the 95th percentile."""
    if not tenths:
        return None
    low, high = min(tenths) / 10, max(tenths) / 10
    width = next((step for step in _STEPS if (high - low) / step < _BARS - 1), 0)
    width = width or math.ceil((high - low) / (_BARS - 1))
    start = math.floor(low / width) * width
    bars = [0] * (math.floor((high - start) / width + 1e-9) + 1)
    for tenth, number in tenths.items():
        bars[math.floor((tenth / 10 - start) / width + 1e-9)] += number
    return {
        "start": round(start, 3),
        "width": width,
        "bars": bars,
        "median": _share(tenths, 0.5),
        "p95": _share(tenths, 0.95),
    }


def _share(tenths: Counter[int], share: float) -> float:
    left = share * tenths.total()
    for tenth in sorted(tenths):
        left -= tenths[tenth]
        if left <= 0:
            break
    return tenth / 10
