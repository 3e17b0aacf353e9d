"""Every pair of states is a legal move, or one that the ledger refuses."""

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
def test_moves_are_exactly_the_legal_ones(before, after):
    assert (after in MOVES[before]) == ((before, after) in LEGAL)


def test_only_stored_has_no_moves():
    assert set(MOVES) == set(State)
    assert [state for state in State if not MOVES[state]] == [State.STORED]


def test_state_sets_agree_with_the_moves():
    assert {State.STORED, State.FAILED} == PAID_STATES - OUTSTANDING_STATES
    assert {State.INTENT, State.UNKNOWN} == OUTSTANDING_STATES - PAID_STATES
    # A further attempt is paid for only while no other is outstanding.
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
    """Return the call that moves a row into the state."""
    return {
        State.INTENT: lambda: ledger.claim(ROW, entry),
        State.ACCEPTED: lambda: ledger.record_accepted(entry, "task_2"),
        State.REJECTED: lambda: ledger.record_rejected(entry, FluxKontextError("no", code=429)),
        State.STORED: lambda: ledger.record_stored(entry, [], []),
        State.FAILED: lambda: ledger.record_failed(entry, FAILED),
    }[state]


# `succeeded` lies between accepted and stored, and `unknown` is an intent whose owner is dead:
# neither is recorded.
WRITTEN = [State.INTENT, State.ACCEPTED, State.REJECTED, State.STORED, State.FAILED]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("before", "after"), list(itertools.product([State.PLANNED, *WRITTEN], WRITTEN))
)
async def test_ledger_refuses_illegal_moves(tmp_path, before, after):
    ledger = Ledger(RecordStore(str(tmp_path)), "o", PRICES)
    entry = entry_in(before)
    legal = (before, after) in LEGAL or (before, after) == (State.ACCEPTED, State.STORED)
    if legal:
        assert (await takes(after, ledger, entry)()).state is after
    else:
        with pytest.raises(LedgerError, match=f"cannot go from {before}"):
            await takes(after, ledger, entry)()
        assert not list(tmp_path.iterdir())


def test_spent_counts_only_accepted_attempts():
    spent = {state: entry_in(state).spent for state in [State.PLANNED, *WRITTEN]}
    assert spent == {
        State.PLANNED: 0,
        State.INTENT: 0,
        State.REJECTED: 0,
        State.ACCEPTED: 0.03,
        State.STORED: 0.03,
        State.FAILED: 0.03,
    }


def test_next_attempt_keeps_the_cost_of_earlier_ones():
    failed = entry_in(State.FAILED)
    again = failed.next_attempt(failed.intent.model_copy(update={"attempt": 2}))
    assert (again.state, again.spent, again.failures) == (State.INTENT, 0.03, 1)


def test_task_needs_an_accepted_attempt():
    with pytest.raises(ValueError, match="no accepted task"):
        _ = entry_in(State.INTENT).task
