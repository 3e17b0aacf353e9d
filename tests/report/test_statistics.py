"""Statistics count every row and every dollar once."""

import pytest

from prefect_flux_kontext.report.statistics import Statistics
from tests.support.galleries import failed, line


def statistics_of(rows):
    counted = Statistics()
    assert list(counted.count(rows)) == rows
    return counted.summarize()


def test_equal_rows_cost_once_and_states_are_counted():
    statistics = statistics_of(
        [line(0, key="k"), line(1, key="k"), failed(2), line(3, state="unknown")]
    )
    assert statistics["states"] == {"stored": 2, "failed": 1, "unknown": 1}
    assert statistics["costUsd"] == pytest.approx(0.09)


def test_speed_counts_images_of_the_last_run_only():
    rows = [line(n, run="a", recorded_at="2026-01-01T00:00:00.000Z") for n in range(9)]
    rows += [line(n, run="b") for n in range(10, 16)]
    rows += [line(20, run="b", stored_before=True, submitted_at="2020-01-01T00:00:00.000Z")]
    statistics = statistics_of(rows)
    assert (statistics["seconds"], statistics["imagesPerSecond"]) == (60, 0.1)


@pytest.mark.parametrize(
    "seconds",
    [[0.0], [30.0] * 5, [0.1, 900.0], [20.0, 20.1, 20.2], list(range(0, 90_000, 700))],
)
def test_histogram_counts_each_image_in_its_bar(seconds):
    statistics = statistics_of([line(n, waiting_seconds=each) for n, each in enumerate(seconds)])
    histogram = statistics["times"]["waiting"]
    assert sum(histogram["bars"]) == len(seconds)
    assert len(histogram["bars"]) <= 24
    for place, bar in enumerate(histogram["bars"]):
        start = histogram["start"] + place * histogram["width"]
        inside = [s for s in seconds if start - 1e-6 <= s < start + histogram["width"] - 1e-6]
        assert bar == len(inside)
    assert min(seconds) <= histogram["median"] <= histogram["p95"] <= max(seconds)


def test_histogram_is_missing_without_times():
    statistics = statistics_of([failed(0, waiting_seconds=None)])
    assert statistics["times"] == {"waiting": None, "generation": None}
    assert (statistics["imagesPerSecond"], statistics["costUsd"]) == (None, 0.03)
