"""The latency model learns how long tasks take, whatever the distribution is."""

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_flux_kontext.client.limits.latency_model import LatencyModel
from prefect_flux_kontext.sandbox import service as latency

AGES = st.floats(0, 5_000)
POLLS = st.lists(st.tuples(AGES, AGES, st.booleans()), max_size=60)


def create_model(polls):
    """Create a model from polls: (age before, age now, whether the task had ended)."""
    model = LatencyModel()
    for one, other, ended in polls:
        since, age = sorted((one, other))
        (model.record_end if ended else model.record_running)(since, age)
    model._rebuild()
    return model


def observe(draw, number, *, cadence=(20.0, 5.0), has_times=True, model=None):
    """Train a model with tasks that are polled first after 20 s and then every 5 s."""
    model = model or LatencyModel()
    for _ in range(number):
        took, since, age = draw(), 0.0, cadence[0]
        while age < took:
            model.record_running(since, age)
            since, age = age, age + cadence[1]
        model.record_end(since, took if has_times else (since + age) / 2)
    return model


def create_lognormal(mean=30.0, spread=0.35, seed=1):
    rng, shape = random.Random(seed), latency.LatencyModel(mean, spread)
    return lambda: shape.draw(rng)


def true_share(age, mean=30.0, spread=0.35):
    variance = math.log1p(spread**2)
    z = (math.log(age) - math.log(mean) + variance / 2) / math.sqrt(variance)
    return math.erfc(z / math.sqrt(2)) / 2


@given(POLLS, AGES, AGES)
def test_running_share_never_rises_with_age(polls, one, other):
    model, (age, later) = create_model(polls), sorted((one, other))
    assert 0 <= model.running_share(later) <= model.running_share(age) <= 1
    assert 0 <= model.running_share(later, of=age) <= 1
    assert model.running_share(age, of=age) in (1, pytest.approx(1))


@given(POLLS, AGES, st.floats(0.001, 100), st.floats(1, 10))
def test_time_to_poll_is_positive_and_grows_with_the_tolerance(polls, age, unnoticed, factor):
    model = create_model(polls)
    pause = model.time_to_poll(age, unnoticed)
    assert 0 < pause < math.inf
    assert model.time_to_poll(age, unnoticed * factor) >= pause * (1 - 1e-9)


@pytest.mark.parametrize("has_times", [True, False])
def test_lognormal_latency_is_learned(has_times):
    model = observe(create_lognormal(), 1_500, has_times=has_times)
    for age in (25, 30, 35, 40, 50):
        assert model.running_share(age) == pytest.approx(true_share(age), abs=0.08)


def test_error_falls_with_the_number_of_tasks():
    few, many = observe(create_lognormal(), 40), observe(create_lognormal(), 1_000)
    assert many.relative_error == pytest.approx(few.relative_error / 5)


def test_bimodal_latency_is_learned():
    rng = random.Random(1)
    model = observe(lambda: rng.choice((10, 50)) * rng.uniform(0.95, 1.05), 1_500, cadence=(8, 4))
    assert model.running_share(20) == pytest.approx(0.5, abs=0.1)
    assert model.running_share(45) == pytest.approx(0.5, abs=0.1)
    assert model.running_share(60) < 0.05
    assert model.time_to_poll(15, 3) > 30


def test_slowdown_shows_before_the_first_slow_task_ends():
    model = observe(create_lognormal(), 1_500)
    before = model.running_share(40)
    for _ in range(600):
        for since, age in itertools.pairwise((0, 20, 25, 30, 35, 40)):
            model.record_running(since, age)
    assert before < 0.25
    assert model.running_share(40) > 0.8


def test_speedup_is_learned_within_a_thousand_tasks():
    model = observe(create_lognormal(90), 1_000)
    model = observe(create_lognormal(30), 1_000, model=model)
    assert model.running_share(40) == pytest.approx(true_share(40), abs=0.1)


def test_five_tasks_give_usable_poll_times():
    model = observe(create_lognormal(), 5)
    assert 5 < model.time_to_poll(0, 3) < 40
    assert 1 < model.time_to_poll(60, 3) < 60


def test_poll_is_due_at_the_expected_unnoticed_time():
    model, unnoticed = observe(create_lognormal(), 1_500), 3.0
    for age in (0, 24, 32, 40):
        pause, step = model.time_to_poll(age, unnoticed), 0.01
        late = sum(
            (1 - model.running_share(age + step * n, of=age)) * step
            for n in range(round(pause / step))
        )
        assert late == pytest.approx(unnoticed, rel=0.05)


def test_about_two_polls_a_task_are_enough():
    model, draw = observe(create_lognormal(), 1_500), create_lognormal(seed=2)
    polls = late = 0.0
    for _ in range(500):
        took, age = draw(), 0.0
        while age < took:
            age += max(3.0, model.time_to_poll(age, 3.0))
            polls += 1
        late += age - took
    assert polls / 500 < 2.1
    assert late / 500 < 7


def test_weights_stay_finite_after_many_observations():
    model = LatencyModel()
    for _ in range(60_000):
        model.record_end(0, 30)
    assert model.running_share(25) > 0.9
    assert model.running_share(35) < 0.1
