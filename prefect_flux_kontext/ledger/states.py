"""The states of a row and the moves between them."""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    """How far a row has come.

    `unknown` is a row whose submit may have been accepted without our learning of it: it is
    never sent again by itself.
    """

    PLANNED = "planned"
    INTENT = "intent"
    ACCEPTED = "accepted"
    UNKNOWN = "unknown"
    REJECTED = "rejected"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STORED = "stored"


MOVES: dict[State, frozenset[State]] = {
    State.PLANNED: frozenset({State.INTENT}),
    State.INTENT: frozenset({State.ACCEPTED, State.REJECTED, State.UNKNOWN}),
    # A person, or a callback that names the row, settles it.
    State.UNKNOWN: frozenset({State.ACCEPTED, State.REJECTED}),
    State.ACCEPTED: frozenset({State.SUCCEEDED, State.FAILED}),
    State.SUCCEEDED: frozenset({State.STORED}),
    # The next attempt, under the next number.
    State.REJECTED: frozenset({State.INTENT}),
    State.FAILED: frozenset({State.INTENT}),
    State.STORED: frozenset(),
}
"""The legal moves; every other is a mistake in this package."""

PAID = frozenset({State.ACCEPTED, State.SUCCEEDED, State.FAILED, State.STORED})
"""States of an attempt that the service bills."""

OWED = frozenset({State.INTENT, State.UNKNOWN, State.ACCEPTED, State.SUCCEEDED})
"""States in which something paid, or maybe paid, is still to come."""
