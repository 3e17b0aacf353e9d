"""The error tree: as drawn, and each error whole after a journey."""

import copy
import inspect
import pickle
import re

import pytest

from prefect_flux_kontext import errors
from prefect_flux_kontext.errors import FluxKontextError, RateLimitedError

KINDS = [
    kind
    for kind in vars(errors).values()
    if inspect.isclass(kind) and issubclass(kind, FluxKontextError)
]


def drawn_tree():
    """Parent of each class by the indentation of the drawing in the module's docstring."""
    parents, above = {}, {}
    for line in errors.__doc__.splitlines():
        match = re.match(r"    ([│├└─ ]*)(\w+Error)\b", line)
        if match:
            depth = len(match[1]) // 4
            parents[match[2]] = above.get(depth - 1)
            above[depth] = match[2]
    return parents


def test_the_tree_is_as_it_is_drawn():
    real = {kind.__name__: kind.__bases__[0].__name__ for kind in KINDS}
    assert drawn_tree() == {**real, "FluxKontextError": None}


def test_each_class_has_one_parent():
    assert all(len(kind.__bases__) == 1 for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("journey", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))])
def test_an_error_arrives_with_its_fields(kind, journey):
    error = kind("what and why", task_id="task_1", code="CODE")
    error.add_note("seen at noon")
    arrived = journey(error)
    assert type(arrived) is kind
    assert str(arrived) == arrived.message == "what and why"
    assert (arrived.task_id, arrived.code, arrived.reason) == ("task_1", "CODE", "CODE")
    assert arrived.__notes__ == ["seen at noon"]


def test_a_rate_limit_arrives_with_its_advice():
    arrived = pickle.loads(pickle.dumps(RateLimitedError("slow down", retry_after=7.5)))
    assert (arrived.retry_after, arrived.code) == (7.5, 429)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_without_a_code_the_reason_is_the_name(kind):
    expected = "429" if kind is RateLimitedError else kind.__name__
    assert kind("what").reason == expected


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_refusal_is_known_not_to_be_accepted_and_so_is_what_was_never_sent(kind):
    known = issubclass(
        kind,
        errors.RefusedError
        | errors.NotConnectedError
        | errors.ConfigurationError
        | errors.ManifestError
        | errors.ReferenceImageError,
    )
    assert kind.not_accepted is known


def test_what_stops_a_batch():
    assert {kind.__name__ for kind in KINDS if kind.fatal} == {
        "BatchStoppedError",
        "BudgetReachedError",
        "ConfigurationError",
        "InsufficientBalanceError",
        "ManifestError",
        "NotConnectedError",
        "UnauthorizedError",
    }


def test_each_class_says_what_it_is():
    assert all(kind.__doc__ for kind in KINDS)
