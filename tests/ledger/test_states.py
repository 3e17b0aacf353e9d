"""Every pair of states: a move that is legal, or one that the ledger refuses."""

import itertools

import pytest

from prefect_flux_kontext.errors import FluxKontextError, GenerationFailedError, LedgerError
from prefect_flux_kontext.ledger.ledger import Ledger
from prefect_flux_kontext.ledger.records import (
    MOVES,
    OUTSTANDING_STATES,
    PAID_STATES,
    Ended,
    Entry,
    Intent,
    Posted,
    State,
)
from prefect_flux_kontext.ledger.store import RecordStore
from prefect_flux_kontext.manifest.row import make_row
from prefect_flux_kontext.models import GenerationRequest

LEGAL = {
    (State.PLANNED, State.INTENT),
    (State.INTENT, State.ACCEPTED),
    (State.INTENT, State.REJECTED),
    (State.INTENT, State.UNKNOWN),
    (State.UNKNOWN, State.ACCEPTED),
    (State.UNKNOWN, State.REJECTED),
    (State.ACCEPTED, State.SUCCEEDED),
    (State.ACCEPTED, State.FAILED),
    (State.SUCCEEDED, State.STORED),
    (State.REJECTED, State.INTENT),
    (State.FAILED, State.INTENT),
}
ROW = make_row(2, {"id": "a", "prompt": "a lighthouse"})
REQUEST = GenerationRequest(prompt="a lighthouse")
PRICES = {"pro": 0.03, "max": 0.06}
FAILED = GenerationFailedError("no", task_id="task_1", code="GENERATION_FAILED")


@pytest.mark.parametrize(("before", "after"), list(itertools.product(State, State)))
def test_a_move_is_legal_or_not(before, after):
    assert (after in MOVES[before]) == ((before, after) in LEGAL)


def test_every_state_has_its_moves_and_only_stored_has_none():
    assert set(MOVES) == set(State)
    assert [state for state in State if not MOVES[state]] == [State.STORED]


def test_what_may_be_paid_and_what_is_owed_agree_with_the_moves():
    assert {State.STORED, State.FAILED} == PAID_STATES - OUTSTANDING_STATES
    assert {State.INTENT, State.UNKNOWN} == OUTSTANDING_STATES - PAID_STATES
    # A further attempt is paid for only where none is owed.
    assert not OUTSTANDING_STATES & {state for state in State if State.INTENT in MOVES[state]}


def entry_in(state):
    intent = Intent(
        key="k", attempt=1, owner="o", nonce="n", row_id="a", line=2, request=REQUEST, price=0.03
    )
    accepted = Posted(state="accepted", by="o", task_id="task_1")
    match state:
        case State.PLANNED:
            return Entry(key="k")
        case State.INTENT:
            return Entry(key="k", attempt=1, intent=intent)
        case State.ACCEPTED:
            return Entry(key="k", attempt=1, intent=intent, posted=accepted)
        case State.REJECTED:
            rejected = Posted(state="rejected", by="o", reason="429")
            return Entry(key="k", attempt=1, intent=intent, posted=rejected)
        case State.FAILED | State.STORED:
            ended = Ended(state=str(state), task_id="task_1")
            return Entry(key="k", attempt=1, intent=intent, posted=accepted, ended=ended)
    return None


def takes(state, ledger, entry):
    """The call that brings a row into the state."""
    return {
        State.INTENT: lambda: ledger.claim(ROW, entry),
        State.ACCEPTED: lambda: ledger.accepted(entry, "task_2"),
        State.REJECTED: lambda: ledger.rejected(entry, FluxKontextError("no", code=429)),
        State.STORED: lambda: ledger.stored(entry, [], []),
        State.FAILED: lambda: ledger.failed(entry, FAILED),
    }[state]


# `succeeded` is passed through on the way from accepted to stored, and `unknown` is an intent
# whose owner is gone: neither is written down.
WRITTEN = [State.INTENT, State.ACCEPTED, State.REJECTED, State.STORED, State.FAILED]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("before", "after"), list(itertools.product([State.PLANNED, *WRITTEN], WRITTEN))
)
async def test_the_ledger_makes_the_legal_moves_and_refuses_the_others(tmp_path, before, after):
    ledger = Ledger(RecordStore(str(tmp_path)), "o", PRICES)
    entry = entry_in(before)
    legal = (before, after) in LEGAL or (before, after) == (State.ACCEPTED, State.STORED)
    if legal:
        assert (await takes(after, ledger, entry)()).state is after
    else:
        with pytest.raises(LedgerError, match=f"cannot go from {before}"):
            await takes(after, ledger, entry)()
        assert not list(tmp_path.iterdir())


def test_only_accepted_attempts_count_as_spent():
    spent = {state: entry_in(state).spent for state in [State.PLANNED, *WRITTEN]}
    assert spent == {
        State.PLANNED: 0,
        State.INTENT: 0,
        State.REJECTED: 0,
        State.ACCEPTED: 0.03,
        State.STORED: 0.03,
        State.FAILED: 0.03,
    }


def test_a_further_attempt_remembers_what_the_earlier_ones_cost():
    failed = entry_in(State.FAILED)
    again = failed.next_attempt(failed.intent.model_copy(update={"attempt": 2}))
    assert (again.state, again.spent, again.failures) == (State.INTENT, 0.03, 1)


def test_a_row_that_was_not_accepted_has_no_task():
    with pytest.raises(ValueError, match="no accepted task"):
        _ = entry_in(State.INTENT).task
