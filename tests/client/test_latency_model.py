"""What is learned of how long tasks take, whatever they do."""

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_flux_kontext.client.limits.latency_model import LatencyModel
from prefect_flux_kontext.sandbox import tasks as latency

AGES = st.floats(0, 5_000)
LOOKS = st.lists(st.tuples(AGES, AGES, st.booleans()), max_size=60)


def taught(looks):
    """A model that has heard of so many looks: (since, until, whether it had ended)."""
    model = LatencyModel()
    for one, other, ended in looks:
        since, age = sorted((one, other))
        (model.record_end if ended else model.record_running)(since, age)
    model._rebuild()
    return model


def watched(draw, number, *, looks=(20.0, 5.0), told=True, model=None):
    """A model taught by tasks that are looked at first after 20 s and then every 5 s."""
    model = model or LatencyModel()
    for _ in range(number):
        took, since, age = draw(), 0.0, looks[0]
        while age < took:
            model.record_running(since, age)
            since, age = age, age + looks[1]
        model.record_end(since, took if told else (since + age) / 2)
    return model


def lognormal(mean=30.0, spread=0.35, seed=1):
    dice, shape = random.Random(seed), latency.LatencyModel(mean, spread)
    return lambda: shape.draw(dice)


def true_share(age, mean=30.0, spread=0.35):
    variance = math.log1p(spread**2)
    z = (math.log(age) - math.log(mean) + variance / 2) / math.sqrt(variance)
    return math.erfc(z / math.sqrt(2)) / 2


@given(LOOKS, AGES, AGES)
def test_the_share_that_still_runs_only_falls(looks, one, other):
    model, (age, later) = taught(looks), sorted((one, other))
    assert 0 <= model.running_share(later) <= model.running_share(age) <= 1
    assert 0 <= model.running_share(later, of=age) <= 1
    assert model.running_share(age, of=age) in (1, pytest.approx(1))


@given(LOOKS, AGES, st.floats(0.001, 100), st.floats(1, 10))
def test_who_is_more_patient_looks_later_and_never_at_once(looks, age, patience, more):
    model = taught(looks)
    pause = model.time_to_poll(age, patience)
    assert 0 < pause < math.inf
    assert model.time_to_poll(age, patience * more) >= pause * (1 - 1e-9)


@given(LOOKS)
def test_the_table_says_what_the_curve_says(looks):
    model = taught(looks)
    shares, doubts, per_second = model.survival_table()
    assert shares == sorted(shares, reverse=True)
    assert min(doubts) >= 0
    for cell, share in enumerate(shares[:: len(shares) // 10]):
        age = (cell * (len(shares) // 10) + 0.5) / per_second if per_second else 0.0
        assert share == pytest.approx(model.running_share(age), abs=1e-9)


@pytest.mark.parametrize("told", [True, False])
def test_a_curve_of_any_shape_is_learned(told):
    model = watched(lognormal(), 1_500, told=told)
    for age in (25, 30, 35, 40, 50):
        assert model.running_share(age) == pytest.approx(true_share(age), abs=0.08)


def test_nothing_is_told_of_ages_that_no_task_was_seen_to_reach():
    model = LatencyModel()
    for _ in range(100):
        model.record_running(0, 20)
    shares, _, per_second = model.survival_table()
    assert len(shares) / per_second == pytest.approx(20, rel=0.07)
    assert min(shares) > 0.95


def test_the_more_tasks_were_seen_the_less_a_share_is_in_doubt():
    def doubt_at_30(number):
        _, doubts, per_second = watched(lognormal(), number).survival_table()
        return sum(doubts[: int(30 * per_second)])

    assert 0 < doubt_at_30(300) < doubt_at_30(30) / 3


def test_two_humps_are_learned_with_the_gap_between_them():
    dice = random.Random(1)
    model = watched(lambda: dice.choice((10, 50)) * dice.uniform(0.95, 1.05), 1_500, looks=(8, 4))
    assert model.running_share(20) == pytest.approx(0.5, abs=0.1)
    assert model.running_share(45) == pytest.approx(0.5, abs=0.1)
    assert model.running_share(60) < 0.05
    assert model.time_to_poll(15, 3) > 30


def test_tasks_that_run_longer_than_ever_show_before_the_first_of_them_has_ended():
    model = watched(lognormal(), 1_500)
    before = model.running_share(40)
    for _ in range(600):
        for since, age in itertools.pairwise((0, 20, 25, 30, 35, 40)):
            model.record_running(since, age)
    assert before < 0.25
    assert model.running_share(40) > 0.8


def test_a_service_that_is_faster_again_is_believed_within_a_thousand_tasks():
    model = watched(lognormal(90), 1_000)
    model = watched(lognormal(30), 1_000, model=model)
    assert model.running_share(40) == pytest.approx(true_share(40), abs=0.1)


def test_a_handful_of_tasks_gives_a_usable_answer():
    model = watched(lognormal(), 5)
    assert 5 < model.time_to_poll(0, 3) < 40
    assert 1 < model.time_to_poll(60, 3) < 60


def test_the_next_look_is_due_when_the_time_that_goes_unnoticed_is_worth_it():
    model, patience = watched(lognormal(), 1_500), 3.0
    for age in (0, 24, 32, 40):
        pause, step = model.time_to_poll(age, patience), 0.01
        late = sum(
            (1 - model.running_share(age + step * n, of=age)) * step
            for n in range(round(pause / step))
        )
        assert late == pytest.approx(patience, rel=0.05)


def test_three_looks_a_task_are_not_needed():
    model, draw = watched(lognormal(), 1_500), lognormal(seed=2)
    looks = late = 0.0
    for _ in range(500):
        took, age = draw(), 0.0
        while age < took:
            age += max(3.0, model.time_to_poll(age, 3.0))
            looks += 1
        late += age - took
    assert looks / 500 < 2.1
    assert late / 500 < 7


def test_numbers_stay_finite_however_long_it_learns():
    model = LatencyModel()
    for _ in range(60_000):
        model.record_end(0, 30)
    assert model.running_share(25) > 0.9
    assert model.running_share(35) < 0.1
