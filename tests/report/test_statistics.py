"""The numbers of an output: every row, every dollar once."""

import pytest

from prefect_flux_kontext.report.statistics import Statistics
from tests.support.galleries import failed, line


def numbers_of(rows):
    numbers = Statistics()
    assert list(numbers.count(rows)) == rows
    return numbers.summarize()


def test_equal_rows_cost_once_and_every_state_is_counted():
    told = numbers_of([line(0, key="k"), line(1, key="k"), failed(2), line(3, state="unknown")])
    assert told["states"] == {"stored": 2, "failed": 1, "unknown": 1}
    assert told["costUsd"] == pytest.approx(0.09)


def test_the_speed_is_that_of_the_last_run_without_what_was_there_before():
    rows = [line(n, run="a", recorded_at="2026-01-01T00:00:00.000Z") for n in range(9)]
    rows += [line(n, run="b") for n in range(10, 16)]
    rows += [line(20, run="b", stored_before=True, submitted_at="2020-01-01T00:00:00.000Z")]
    told = numbers_of(rows)
    assert (told["seconds"], told["imagesPerSecond"]) == (60, 0.1)


@pytest.mark.parametrize(
    "seconds",
    [[0.0], [30.0] * 5, [0.1, 900.0], [20.0, 20.1, 20.2], list(range(0, 90_000, 700))],
)
def test_a_histogram_has_each_image_in_the_bar_of_its_time(seconds):
    told = numbers_of([line(n, waiting_seconds=each) for n, each in enumerate(seconds)])
    drawn = told["times"]["waiting"]
    assert sum(drawn["bars"]) == len(seconds)
    assert len(drawn["bars"]) <= 24
    for place, bar in enumerate(drawn["bars"]):
        start = drawn["start"] + place * drawn["width"]
        inside = [s for s in seconds if start - 1e-6 <= s < start + drawn["width"] - 1e-6]
        assert bar == len(inside)
    assert min(seconds) <= drawn["median"] <= drawn["p95"] <= max(seconds)


def test_nothing_measured_is_no_histogram():
    told = numbers_of([failed(0, waiting_seconds=None)])
    assert told["times"] == {"waiting": None, "generation": None}
    assert (told["imagesPerSecond"], told["costUsd"]) == (None, 0.03)
