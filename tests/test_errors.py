"""The error tree matches its docstring, and errors survive copy and pickle."""

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


def parse_tree():
    """Return the parent of each class, from the indentation of the tree in the docstring."""
    parents, above = {}, {}
    for line in errors.__doc__.splitlines():
        match = re.match(r"    ([│├└─ ]*)(\w+Error)\b", line)
        if match:
            depth = len(match[1]) // 4
            parents[match[2]] = above.get(depth - 1)
            above[depth] = match[2]
    return parents


def test_error_tree_matches_the_docstring():
    real = {kind.__name__: kind.__bases__[0].__name__ for kind in KINDS}
    assert parse_tree() == {**real, "FluxKontextError": None}


def test_error_has_one_parent():
    assert all(len(kind.__bases__) == 1 for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("transfer", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))])
def test_error_survives_copy_and_pickle(kind, transfer):
    error = kind("what and why", task_id="task_1", code="CODE")
    error.add_note("seen at noon")
    received = transfer(error)
    assert type(received) is kind
    assert str(received) == received.message == "what and why"
    assert (received.task_id, received.code, received.reason) == ("task_1", "CODE", "CODE")
    assert received.__notes__ == ["seen at noon"]


def test_rate_limit_error_survives_pickle():
    received = pickle.loads(pickle.dumps(RateLimitedError("slow down", retry_after=7.5)))
    assert (received.retry_after, received.code) == (7.5, 429)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_reason_without_a_code_is_the_class_name(kind):
    expected = "429" if kind is RateLimitedError else kind.__name__
    assert kind("what").reason == expected


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_not_accepted_is_true_for_refused_and_unsent_requests(kind):
    known = issubclass(
        kind,
        errors.RefusedError
        | errors.NotConnectedError
        | errors.ConfigurationError
        | errors.ManifestError
        | errors.ReferenceImageError,
    )
    assert kind.not_accepted is known


def test_fatal_errors_are_these():
    assert {kind.__name__ for kind in KINDS if kind.fatal} == {
        "BatchStoppedError",
        "BudgetReachedError",
        "ConfigurationError",
        "InsufficientBalanceError",
        "ManifestError",
        "NotConnectedError",
        "UnauthorizedError",
    }


def test_error_has_a_docstring():
    assert all(kind.__doc__ for kind in KINDS)
