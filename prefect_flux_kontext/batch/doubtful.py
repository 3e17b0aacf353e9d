"""Rows whose submit's reply was lost: settled by a callback or a person, else held as unknown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefect_flux_kontext.batch.summary import RowOutcome
from prefect_flux_kontext.errors import FluxKontextError, ReplyLostError
from prefect_flux_kontext.ledger.records import GIVEN_UP
from prefect_flux_kontext.ledger.states import State

if TYPE_CHECKING:
    from prefect_flux_kontext.batch.submitting import Submitter
    from prefect_flux_kontext.callbacks.mode import CallbackMode
    from prefect_flux_kontext.ledger.ledger import Ledger
    from prefect_flux_kontext.ledger.records import Entry
    from prefect_flux_kontext.manifest.rows import Row
    from prefect_flux_kontext.storage import OutputFolder


class Doubtful:
    """Settles rows whose latest attempt has an intent and no outcome.

    Args:
        ledger: Where other runs write what theirs came to.
        called: What callbacks say.
        submitter: Counts what is found to be accepted.
        output: The batch's output, to tell a person about.
        resubmit_unknown: Give an attempt up where nothing more can be learned of it.
    """

    def __init__(
        self,
        ledger: Ledger,
        called: CallbackMode,
        submitter: Submitter,
        output: OutputFolder,
        *,
        resubmit_unknown: bool,
    ) -> None:
        self._ledger = ledger
        self._called = called
        self._submitter = submitter
        self._output = output
        self._resubmit = resubmit_unknown

    async def settle(self, row: Row, entry: Entry) -> Entry | RowOutcome:
        """What the row came to, or that nobody can tell so far.

        Raises:
            LedgerError: The ledger cannot be read or written.
        """
        entry, gone = await self._ledger.settled(entry)
        if entry.state is not State.INTENT or entry.intent is None:
            return entry
        adopted = await self._called.adopted(entry)
        if adopted is not None:
            if entry.intent.owner == self._ledger.owner and adopted.state is State.ACCEPTED:
                self._submitter.count(adopted)
            return adopted
        if self._resubmit and gone and not self._called.may_be_called(entry.key):
            given_up = FluxKontextError("Given up to be paid for again.", code=GIVEN_UP)
            return await self._ledger.rejected(entry, given_up, by="person")
        whose = "is gone" if gone else "does not know what came of it"
        lost = ReplyLostError(f"The run that submitted it at {entry.intent.at:%F %T %Z} {whose}.")
        return self.unknown(row, lost)

    def unknown(self, row: Row, error: FluxKontextError) -> RowOutcome:
        """The outcome of a row of which nobody can tell whether it is paid for."""
        message = (
            f"{error.message} The row may be paid for, so it is not submitted again. Settle it "
            f"with `flux-kontext resolve {self._output} {row.key}`, or pay again with "
            "--resubmit-unknown."
        )
        told = ReplyLostError(message, task_id=error.task_id, code=error.code)
        return RowOutcome.of(row, row.key, "unknown", told)
