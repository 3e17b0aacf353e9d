"""The estimate of running tasks and its standard deviation."""

import math

import pytest

from prefect_flux_kontext.client.limits.concurrency import RunningEstimate, WatchedTask
from prefect_flux_kontext.client.limits.latency_model import LatencyModel


def known_model(tasks):
    """Return a model of `tasks` tasks, half of 20 s and half of 40 s."""
    model = LatencyModel()
    for number in range(tasks):
        model.record_end(0, 40 if number % 2 else 20)
    return model


def estimate(*watched):
    """Estimate at the 30th second of the loop."""
    result = RunningEstimate()
    result.refresh(watched, 30.0, 0.0)
    return result


def test_tasks_without_a_known_model_count_as_running():
    for model in (None, LatencyModel()):
        result = estimate(*[WatchedTask(0.0, model)] * 100)
        assert (result.mean, result.deviation) == (100, 0)


def test_tasks_count_by_their_probability():
    result = estimate(*[WatchedTask(0.0, known_model(2_000))] * 100)
    assert result.mean == pytest.approx(50, abs=2)
    by_chance, by_the_model = math.sqrt(100 / 4), 50 * 2 / math.sqrt(1_500)
    assert result.deviation == pytest.approx(math.hypot(by_chance, by_the_model), rel=0.05)


def test_task_seen_running_counts_as_running():
    result = estimate(*[WatchedTask(0.0, known_model(2_000), last_running_age=30.0)] * 100)
    assert result.mean == pytest.approx(100, abs=1)


def test_error_of_a_new_model_adds_to_the_deviation():
    result = estimate(*[WatchedTask(0.0, known_model(50))] * 1_000)
    assert result.mean == pytest.approx(500, abs=20)
    assert result.deviation > 1_000 * 0.5 / math.sqrt(50) * 0.8


def test_errors_of_two_models_are_independent():
    one, other = ([WatchedTask(0.0, known_model(50))] * 500 for _ in range(2))
    alone = estimate(*one)
    both = estimate(*one, *other)
    assert both.mean == pytest.approx(2 * alone.mean)
    assert both.deviation == pytest.approx(math.sqrt(2) * alone.deviation)
