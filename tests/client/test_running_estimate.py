"""How many tasks are taken to run, and how sure that is."""

import math

import pytest

from prefect_flux_kontext.client.limits.concurrency import RunningEstimate, WatchedTask
from prefect_flux_kontext.client.limits.latency_model import LatencyModel


def known_model(tasks):
    """Half of the tasks take 20 s and half 40 s, as so many have shown."""
    model = LatencyModel()
    for number in range(tasks):
        model.record_end(0, 40 if number % 2 else 20)
    return model


def estimate(*watched):
    """Counted at the 30th second of the loop."""
    counted = RunningEstimate()
    counted.refresh(watched, 30.0, 0.0)
    return counted


def test_tasks_of_which_nothing_is_known_all_run():
    for model in (None, LatencyModel()):
        counted = estimate(*[WatchedTask(0.0, model)] * 100)
        assert (counted.mean, counted.deviation) == (100, 0)


def test_tasks_count_by_how_likely_they_run():
    counted = estimate(*[WatchedTask(0.0, known_model(2_000))] * 100)
    assert counted.mean == pytest.approx(50, abs=2)
    assert counted.deviation == pytest.approx(math.sqrt(100 / 4), rel=0.1)


def test_a_task_that_was_seen_to_run_does():
    counted = estimate(*[WatchedTask(0.0, known_model(2_000), last_running_age=30.0)] * 100)
    assert counted.mean == pytest.approx(100, abs=1)


def test_where_little_was_seen_all_tasks_of_an_age_may_be_counted_wrongly_together():
    counted = estimate(*[WatchedTask(0.0, known_model(50))] * 1_000)
    assert counted.mean == pytest.approx(500, abs=20)
    assert counted.deviation > 1_000 * 0.5 / math.sqrt(50) * 0.8


def test_the_doubts_of_two_kinds_of_tasks_are_their_own():
    one, other = ([WatchedTask(0.0, known_model(50))] * 500 for _ in range(2))
    alone = estimate(*one)
    both = estimate(*one, *other)
    assert both.mean == pytest.approx(2 * alone.mean)
    assert both.deviation == pytest.approx(math.sqrt(2) * alone.deviation)
