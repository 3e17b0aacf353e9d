"""Callback mode as a batch uses it: URLs for submits, hints for rows, lost replies found."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from prefect_flux_kontext.callbacks.adopting import adopt
from prefect_flux_kontext.callbacks.hints import Hints
from prefect_flux_kontext.callbacks.inbox import INBOX_FOLDER, Inbox
from prefect_flux_kontext.callbacks.tokens import Attempt, checked_secret, token_for
from prefect_flux_kontext.callbacks.watching import Watcher
from prefect_flux_kontext.ledger.store import RecordStore
from prefect_flux_kontext.models import utc_now

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from prefect_flux_kontext.api.cadence import PollingCadence
    from prefect_flux_kontext.api.client import FluxKontextClient
    from prefect_flux_kontext.api.waiting import Pauses
    from prefect_flux_kontext.callbacks.options import CallbackOptions
    from prefect_flux_kontext.ledger.ledger import Ledger
    from prefect_flux_kontext.ledger.records import Entry
    from prefect_flux_kontext.models import GenerationRequest

logger = logging.getLogger(__name__)


_REMEMBERED_TASKS = 20_000
"""Tasks of other rows to tell a false hint by: ten minutes of submits at full speed."""


@asynccontextmanager
async def callback_mode(
    options: CallbackOptions, client: FluxKontextClient, ledger: Ledger
) -> AsyncIterator[CallbackMode]:
    """Be called back while the block runs; where there is no URL, poll.

    Without a URL too, what an ended run was told settles the rows that it left unknown.

    Raises:
        ConfigurationError: The address to receive callbacks on cannot be listened on.
    """
    store = RecordStore(options.inbox) if options.inbox else ledger.store.below(INBOX_FOLDER)
    inbox, hints = Inbox(store), Hints()
    watcher = Watcher(inbox, hints, ledger.owner)
    mode = CallbackMode(options, client, ledger, hints, watcher)
    if options.url is None:
        yield mode
        return
    async with AsyncExitStack() as stack:
        if options.listen is not None:
            # Here, because they take a while to import.
            from prefect_flux_kontext.callbacks.receiver import create_receiver  # noqa: PLC0415
            from prefect_flux_kontext.callbacks.server import served  # noqa: PLC0415

            inbox.on_kept = watcher.kept
            receiver = create_receiver(inbox, options.secret)
            url = await stack.enter_async_context(served(receiver, *options.listen))
            logger.info("Callbacks are received on %s.", url)
        watching = asyncio.create_task(watcher.watch())
        try:
            yield mode
        finally:
            watching.cancel()
            await asyncio.wait({watching})
            await watcher.remove_ended()


class CallbackMode:
    """What the rows of a batch need to be called back.

    Args:
        options: What a person has decided.
        client: The service.
        ledger: Where it stands what was paid for.
        hints: What callbacks have told.
        watcher: Where they come from.
    """

    def __init__(
        self,
        options: CallbackOptions,
        client: FluxKontextClient,
        ledger: Ledger,
        hints: Hints,
        watcher: Watcher,
    ) -> None:
        self._options = options
        self._secret = checked_secret(options.secret) if options.url else b""
        self._client = client
        self._ledger = ledger
        self._hints = hints
        self._watcher = watcher
        self._doubtful: set[Attempt] = set()
        self._tasks: deque[str] = deque(maxlen=_REMEMBERED_TASKS)

    def request(self, request: GenerationRequest, entry: Entry) -> GenerationRequest:
        """The request of a claimed attempt as it is sent, with its callback URL.

        The URL is a secret: it goes into the POST and nowhere else.
        """
        if self._options.url is None:
            return request
        attempt = _attempt(entry)
        self._hints.expect(attempt)
        url = f"{self._options.url}/{token_for(self._secret, attempt)}"
        return request.model_copy(update={"callback_url": url, "request_type": "callback"})

    def pauses(self, entry: Entry, cadence: PollingCadence) -> Pauses | None:
        """The pauses between looks at the row's accepted task; None for those of polling."""
        attempt = _attempt(entry)
        self._tasks.append(entry.task.task_id)
        if self._hints.expected(attempt):
            return _Called(self._hints, attempt, cadence, self._options.sweep)
        return None

    def ended(self, entry: Entry) -> None:
        """The row's task has ended: whatever is still heard of it is of no use."""
        attempt = _attempt(entry)
        others = [name for name in self._hints.task_ids(attempt) if name != entry.task.task_id]
        if others:
            logger.error(
                "Row %s is task %s and was called back as %s too: look whether it is paid for "
                "twice.",
                entry.key,
                entry.task.task_id,
                ", ".join(others),
            )
        self._hints.ended(attempt)

    async def adopted(self, entry: Entry) -> Entry | None:
        """The row with the task that a callback has named for it; None where none has, so far.

        Args:
            entry: A row whose latest attempt has no outcome on record.

        Raises:
            LedgerError: The adoption cannot be recorded.
        """
        attempt = _attempt(entry)
        age = (utc_now() - entry.intent.at).total_seconds() if entry.intent else 0.0
        self._hints.expect(attempt, max(0.0, age))
        await self._watcher.claim(attempt)
        self._doubtful.add(attempt)
        named = self._hints.task_ids(attempt)
        adopted = await adopt(self._client, self._ledger, entry, named, self._tasks)
        if adopted is not None:
            self._doubtful.discard(attempt)
        return adopted

    def may_be_called(self, key: str) -> bool:
        """Whether there is still hope that a callback settles the row."""
        return self._left(key) > 0

    async def news(self, key: str) -> None:
        """Wait until something new is heard of a row, or the time for it is over."""
        expected = self._hints.latest(key)
        if expected is not None:
            await self._hints.wait(expected[0], self._left(key))

    async def clear(self, owners: Iterable[str]) -> None:
        """Remove what was heard for ended runs, unless one of their rows is still unknown."""
        await self._watcher.clear(set(owners) - {attempt.owner for attempt in self._doubtful})

    def _left(self, key: str) -> float:
        expected = self._hints.latest(key)
        if self._options.url is None or expected is None:
            return 0.0
        return max(0.0, self._options.grace - expected[1])


class _Called:
    """Pauses that a callback ends; looks without one are rare while callbacks come."""

    def __init__(
        self, hints: Hints, attempt: Attempt, cadence: PollingCadence, sweep: float
    ) -> None:
        self._hints = hints
        self._attempt = attempt
        self._cadence = cadence
        self._sweep = sweep
        self._unconfirmed = 0

    async def before_first_look(self, age: float) -> None:
        """Wait to be called, but no longer than a poll or a sweep would."""
        longest = self._sweep if self._hints.reliable else self._cadence.initial_delay
        if self._hints.heard(self._attempt):
            longest = 0.0
        await self._hints.wait(self._attempt, longest - age)

    async def before_next_look(self) -> None:
        """Wait to be called; a hint that was not true yet is looked into soon, then less often."""
        longest = self._sweep if self._hints.reliable else self._cadence.interval
        if self._hints.heard(self._attempt):
            soon = self._cadence.interval * 2**self._unconfirmed
            longest = min(longest, soon)
            self._unconfirmed = min(self._unconfirmed + 1, 16)
        await self._hints.wait(self._attempt, longest)


def _attempt(entry: Entry) -> Attempt:
    owner = entry.intent.owner if entry.intent else ""
    return Attempt(owner, entry.key, entry.attempt)
