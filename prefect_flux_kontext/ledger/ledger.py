"""The ledger of a batch: one row's records, claimed, read and written."""

from __future__ import annotations

import asyncio
import secrets
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel, ValidationError

from prefect_flux_kontext.errors import LedgerError
from prefect_flux_kontext.ledger.heartbeat import is_alive
from prefect_flux_kontext.ledger.records import MOVES, Ended, Entry, Intent, Posted, State, Times
from prefect_flux_kontext.references.identity import url_identity

if TYPE_CHECKING:
    from prefect_flux_kontext.errors import FluxKontextError
    from prefect_flux_kontext.ledger.store import RecordStore
    from prefect_flux_kontext.manifest.row import Row
    from prefect_flux_kontext.models import GenerationRequest, StoredImage

R = TypeVar("R", bound=BaseModel)

_UNTIMED = Times()
_LOOK_AGAIN = 2.0
_LONGEST_SILENCE = 180.0
"""Seconds after which a living owner will not tell any more: no POST takes 120, and recording
its outcome some. Two runs that lost a reply each would else wait for one another's end."""


class RowAlreadyClaimedError(Exception):
    """Another run was first to claim the attempt; read the row again."""


class Ledger:
    """Claims rows and records what came of them.

    Args:
        store: Where the records are.
        owner: The name of this run.
        prices: Dollars for an image, by mode.
    """

    def __init__(self, store: RecordStore, owner: str, prices: dict[str, float]) -> None:
        self.store = store
        self.owner = owner
        self._prices = prices

    def price_of(self, request: GenerationRequest) -> float:
        """Dollars for one image of the request."""
        return self._prices[request.mode]

    async def read(self, key: str) -> Entry:
        """What the records say of a row.

        Raises:
            LedgerError: A record cannot be read or is damaged; the row must not be paid for.
        """
        entry = Entry(key=key)
        while True:
            number = entry.attempt + 1
            intent = await self._read(Intent, _name(key, number, "intent"))
            if intent is None:
                return entry
            posted, ended = await asyncio.gather(
                self._read(Posted, _name(key, number, "posted")),
                self._read(Ended, _name(key, number, "ended")),
            )
            entry = entry.next_attempt(intent).model_copy(
                update={"posted": posted, "ended": ended}
            )
            if State.INTENT not in MOVES[entry.state]:
                return entry

    async def settled(self, entry: Entry) -> tuple[Entry, bool]:
        """Wait while another run is paying for the row, and tell what it came to.

        Returns:
            The row, and whether it is certain that the intent's owner is gone. A row that comes
            back as `intent` is `unknown`: nobody will write what became of it.
        """
        waited = 0.0
        while entry.state is State.INTENT and entry.intent is not None:
            ours = entry.intent.owner == self.owner  # a row is in one place at a time
            gone = not ours and not await is_alive(self.store, entry.intent.owner)
            before, entry = entry, await self.read(entry.key)
            # Only now, for the owner may have told and gone between our two looks. And only of
            # the attempt that it owned: another may have come after it.
            if entry == before:
                if ours or gone or waited >= _LONGEST_SILENCE:
                    return entry, gone
                await asyncio.sleep(_LOOK_AGAIN)
                waited += _LOOK_AGAIN
        return entry, False

    async def claim(self, row: Row, entry: Entry) -> Entry:
        """Write the intent to pay for the row's next attempt, before the POST.

        Raises:
            RowTakenError: Somebody else has claimed this attempt.
            LedgerError: It cannot be written; nothing may be paid.
        """
        _check(entry, State.INTENT)
        intent = Intent(
            key=entry.key,
            attempt=entry.attempt + 1,
            owner=self.owner,
            nonce=secrets.token_urlsafe(24),
            row_id=row.id,
            line=row.line,
            name=row.name,
            style=row.style,
            request=_without_secrets(row.request),
            price=self.price_of(row.request),
        )
        claimed = entry.next_attempt(intent)
        if not await self._create(claimed, "intent", intent):
            raise RowAlreadyClaimedError(entry.key)
        return claimed

    async def accepted(self, entry: Entry, task_id: str, *, by: str | None = None) -> Entry:
        """Record that the attempt was accepted; another outcome on record stands."""
        posted = Posted(state="accepted", by=by or self.owner, task_id=task_id)
        return await self._post(entry, posted)

    async def rejected(
        self, entry: Entry, error: FluxKontextError, *, by: str | None = None
    ) -> Entry:
        """Record that the attempt is known not to have been accepted, or is given up."""
        posted = Posted(
            state="rejected", by=by or self.owner, reason=error.reason, message=error.message
        )
        return await self._post(entry, posted)

    async def stored(
        self,
        entry: Entry,
        files: list[str],
        images: list[StoredImage],
        times: Times = _UNTIMED,
    ) -> Entry:
        """Record that the row's images are in their place."""
        _check(entry, State.SUCCEEDED, State.STORED)
        task = entry.task
        ended = Ended(
            state="stored",
            task_id=task.task_id,
            files=files,
            images=images,
            submitted_at=task.submitted_at,
            **times._asdict(),
        )
        return await self._end(entry, ended)

    async def failed(self, entry: Entry, error: FluxKontextError) -> Entry:
        """Record that the service gave up on the attempt."""
        _check(entry, State.FAILED)
        task = entry.task
        ended = Ended(
            state="failed",
            task_id=task.task_id,
            reason=error.reason,
            message=error.message,
            submitted_at=task.submitted_at,
        )
        return await self._end(entry, ended)

    async def _post(self, entry: Entry, posted: Posted) -> Entry:
        _check(entry, State(posted.state))
        if await self._create(entry, "posted", posted):
            return entry.model_copy(update={"posted": posted})
        return await self.read(entry.key)

    async def _end(self, entry: Entry, ended: Ended) -> Entry:
        if await self._create(entry, "ended", ended):
            return entry.model_copy(update={"ended": ended})
        return await self.read(entry.key)

    async def _create(self, entry: Entry, step: str, record: BaseModel) -> bool:
        data = record.model_dump_json(exclude_none=True).encode()
        return await self.store.create(_name(entry.key, entry.attempt, step), data)

    async def _read(self, kind: type[R], name: str) -> R | None:
        data = await self.store.read(name)
        if data is None:
            return None
        try:
            return kind.model_validate_json(data)
        except ValidationError as error:
            raise LedgerError(
                f"The ledger record {self.store}/{name} is damaged ({error.error_count()} "
                f"problems in {len(data)} bytes), so its row is not paid for. Mend or remove it."
            ) from None


def _name(key: str, attempt: int, step: str) -> str:
    return f"rows/{key[:2]}/{key}.{attempt}.{step}.json"


def _without_secrets(request: GenerationRequest) -> GenerationRequest:
    return request.model_copy(
        update={
            "image_urls": [url_identity(url) for url in request.image_urls],
            "callback_url": None,
            "request_type": "async",
        }
    )


def _check(entry: Entry, *steps: State) -> None:
    state = entry.state
    for step in steps:
        if step not in MOVES[state]:
            raise LedgerError(f"Row {entry.key} cannot go from {state} to {step}.")
        state = step
