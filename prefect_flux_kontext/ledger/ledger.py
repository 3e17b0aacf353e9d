"""The ledger of a batch: claims, reads and writes the records of single rows."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel, ValidationError

from prefect_flux_kontext.errors import LedgerError
from prefect_flux_kontext.ledger.heartbeat import is_alive
from prefect_flux_kontext.ledger.packs import Packs
from prefect_flux_kontext.ledger.records import MOVES, Ended, Entry, Intent, Posted, State, Times
from prefect_flux_kontext.models import utc_now
from prefect_flux_kontext.redaction import redact_text, redact_url
from prefect_flux_kontext.settings import find_price
from prefect_flux_kontext.telemetry import trace

if TYPE_CHECKING:
    from collections.abc import Mapping

    from prefect_flux_kontext.errors import FluxKontextError
    from prefect_flux_kontext.ledger.store import RecordStore
    from prefect_flux_kontext.manifest.row import Row
    from prefect_flux_kontext.models import GenerationRequest, StoredImage

R = TypeVar("R", bound=BaseModel)

_UNTIMED = Times()
_OUTCOME_RECHECK_SECONDS = 2.0
_OUTCOME_WAIT_SECONDS = 180.0
"""How long to wait for a living owner to record an outcome. A POST takes less than 120 s, and
recording its outcome a little longer. Without a limit, two runs that each lost a reply would
wait for each other forever."""


_LONG_POST_SECONDS = 10.0
"""A longer POST may outlive its owner's heartbeat, of which four may be missed."""


async def is_submitting(store: RecordStore, intent: Intent) -> bool:
    """Whether a living run may still record the outcome of an attempt.

    Raises:
        LedgerError: The ledger cannot be read.
    """
    age = (utc_now() - intent.at).total_seconds()
    return age < _OUTCOME_WAIT_SECONDS and await is_alive(store, intent.owner)


class RowAlreadyClaimedError(Exception):
    """Another run claimed the attempt first; read the row again."""


class Ledger:
    """Claims rows and records their outcomes.

    Args:
        store: The ledger's records.
        owner: The name of this run.
        prices: Dollars an image, by mode; see `find_price`.
    """

    def __init__(self, store: RecordStore, owner: str, prices: dict[str, float]) -> None:
        self.store = store
        self.owner = owner
        self._prices = prices
        self._packs = Packs(store)

    def price_of(self, request: GenerationRequest) -> float:
        """Return the price of one image of the request, in dollars."""
        return find_price(self._prices, request.mode, request.provider)

    async def read(self, key: str) -> Entry:
        """Read a row's records.

        Raises:
            LedgerError: A record cannot be read or is damaged; the row must not be paid for.
        """
        packed = await self._packs.find(key)
        entry = await self.parse(key, packed)
        if packed is None and entry.attempt and entry.ended is None:
            # Its other records may just have been packed and removed.
            packed = await self._packs.find(key, refresh=True)
            entry = entry if packed is None else await self.parse(key, packed)
        return entry

    async def parse(self, key: str, packed: Mapping[str, bytes] | None) -> Entry:
        """Return a row from its packed records, or from its own where these are None.

        Raises:
            LedgerError: A record cannot be read or is damaged; the row must not be paid for.
        """
        entry = Entry(key=key)
        while True:
            number = entry.attempt + 1
            intent = await self._read(Intent, key, number, "intent", packed)
            if intent is None:
                return entry
            if (intent.key, intent.attempt) != (key, number):
                raise LedgerError(
                    f"The ledger record {self.store}/{_record_name(key, number, 'intent')} is "
                    "damaged (it is about another row or attempt), so its row is not paid for. "
                    "Fix or remove it."
                )
            posted, ended = await asyncio.gather(
                self._read(Posted, key, number, "posted", packed),
                self._read(Ended, key, number, "ended", packed),
            )
            entry = entry.next_attempt(intent).model_copy(
                update={"posted": posted, "ended": ended}
            )
            if State.INTENT not in MOVES[entry.state]:
                return entry

    async def read_task_ids(self, key: str) -> list[str]:
        """Return the tasks of all attempts of a row.

        Raises:
            LedgerError: A record cannot be read or is damaged.
        """
        task_ids = []
        packed = await self._packs.find(key)
        for number in itertools.count(1):
            posted = await self._read(Posted, key, number, "posted", packed)
            if posted is None:
                break
            if posted.task_id is not None:
                task_ids.append(posted.task_id)
        return task_ids

    async def wait_until_settled(self, entry: Entry) -> tuple[Entry, bool]:
        """Wait while another run is paying for the row.

        Returns:
            The row, and whether the intent's owner is known to be dead. A row that is returned
            as `intent` is `unknown`: no run will record its outcome.

        Raises:
            LedgerError: The ledger cannot be read.
        """
        waited = 0.0
        while entry.state is State.INTENT and entry.intent is not None:
            ours = entry.intent.owner == self.owner  # a row is in one place at a time
            gone = not ours and not await is_alive(self.store, entry.intent.owner)
            before, entry = entry, await self.read(entry.key)
            # The row is read after the liveness check, because the owner may have recorded its
            # outcome and ended in between. A changed row may have a further attempt, with
            # another owner.
            if entry == before:
                if ours or gone or waited >= _OUTCOME_WAIT_SECONDS:
                    return entry, gone
                await asyncio.sleep(_OUTCOME_RECHECK_SECONDS)
                waited += _OUTCOME_RECHECK_SECONDS
        return entry, False

    @trace("claim")
    async def claim(self, row: Row, entry: Entry, columns: dict[str, str] | None = None) -> Entry:
        """Write the intent to pay for the row's next attempt, before the POST.

        Args:
            row: The row.
            entry: What is on record for it.
            columns: The values by which its money is counted.

        Raises:
            RowAlreadyClaimedError: Another run has claimed this attempt.
            LedgerError: The intent cannot be written; nothing may be paid.
        """
        _check_moves(entry, State.INTENT)
        intent = Intent(
            key=entry.key,
            attempt=entry.attempt + 1,
            owner=self.owner,
            nonce=secrets.token_urlsafe(24),
            row_id=row.id,
            line=row.line,
            name=row.name,
            style=row.style,
            variant=row.variant,
            request=_without_secrets(row.request),
            price=self.price_of(row.request),
            columns=columns or None,
        )
        claimed = entry.next_attempt(intent)
        if not await self._create(claimed, "intent", intent):
            raise RowAlreadyClaimedError(entry.key)
        # The intent may have the place of one that was packed and removed since the row was read.
        try:
            packed = await self._packs.find(entry.key, refresh=True)
        except LedgerError as error:
            with contextlib.suppress(LedgerError):
                await self.record_rejected(claimed, error)
            raise
        if packed is not None:
            raise RowAlreadyClaimedError(entry.key)
        return claimed

    async def record_accepted(self, entry: Entry, task_id: str, *, by: str | None = None) -> Entry:
        """Record that the attempt was accepted; an outcome already on record takes precedence."""
        posted = Posted(state="accepted", by=by or self.owner, task_id=task_id)
        return await self._record_post(entry, posted)

    async def record_rejected(
        self, entry: Entry, error: FluxKontextError, *, by: str | None = None
    ) -> Entry:
        """Record that the attempt is known not to have been accepted, or was given up."""
        posted = Posted(
            state="rejected", by=by or self.owner, reason=error.reason, message=error.message
        )
        return await self._record_post(entry, posted)

    async def record_stored(
        self,
        entry: Entry,
        files: list[str],
        images: list[StoredImage],
        times: Times = _UNTIMED,
    ) -> Entry:
        """Record that the row's images are stored."""
        _check_moves(entry, State.SUCCEEDED, State.STORED)
        task = entry.task
        ended = Ended(
            state="stored",
            task_id=task.task_id,
            files=files,
            images=images,
            submitted_at=task.submitted_at,
            **times._asdict(),
        )
        return await self._record_end(entry, ended)

    async def record_failed(self, entry: Entry, error: FluxKontextError) -> Entry:
        """Record that the accepted attempt failed."""
        _check_moves(entry, State.FAILED)
        task = entry.task
        ended = Ended(
            state="failed",
            task_id=task.task_id,
            reason=error.reason,
            message=error.message,
            submitted_at=task.submitted_at,
        )
        return await self._record_end(entry, ended)

    async def _record_post(self, entry: Entry, posted: Posted) -> Entry:
        _check_moves(entry, State(posted.state))
        recorded = await self._create(entry, "posted", posted)
        if recorded and entry.intent is not None:
            age = (utc_now() - entry.intent.at).total_seconds()
            if age > _LONG_POST_SECONDS:  # perhaps frozen: others may have settled and packed it
                recorded = await self._packs.find(entry.key, refresh=True) is None
        if recorded:
            return entry.model_copy(update={"posted": posted})
        return await self.read(entry.key)

    async def _record_end(self, entry: Entry, ended: Ended) -> Entry:
        if await self._create(entry, "ended", ended):
            return entry.model_copy(update={"ended": ended})
        return await self.read(entry.key)

    async def _create(self, entry: Entry, step: str, record: BaseModel) -> bool:
        data = record.model_dump_json(exclude_none=True).encode()
        return await self.store.create(_record_name(entry.key, entry.attempt, step), data)

    async def _read(
        self,
        kind: type[R],
        key: str,
        attempt: int,
        step: str,
        packed: Mapping[str, bytes] | None,
    ) -> R | None:
        name = _record_name(key, attempt, step)
        if packed is None:
            data = await self.store.read(name)
        else:
            data = packed.get(f"{attempt}.{step}")
        if data is None:
            return None
        try:
            return kind.model_validate_json(data)
        except ValidationError as error:
            raise LedgerError(
                f"The ledger record {self.store}/{name} is damaged ({error.error_count()} "
                f"problems in {len(data)} bytes), so its row is not paid for. Fix or remove it."
            ) from None


def _record_name(key: str, attempt: int, step: str) -> str:
    return f"rows/{key[:2]}/{key}.{attempt}.{step}.json"


def _without_secrets(request: GenerationRequest) -> GenerationRequest:
    return request.model_copy(
        update={
            "prompt": redact_text(request.prompt),
            "image_urls": [redact_url(url) for url in request.image_urls],
            "callback_url": None,
            "request_type": "async",
        }
    )


def _check_moves(entry: Entry, *steps: State) -> None:
    state = entry.state
    for step in steps:
        if step not in MOVES[state]:
            raise LedgerError(f"Row {entry.key} cannot go from {state} to {step}.")
        state = step
