"""Callbacks during a batch: the rows that wait for them and the inbox that delivers them.

`CallbackSession` is what the batch uses. Its `InboxWatcher` reads the inbox and passes callbacks
to `CallbackNotifications`, which wakes the waiting rows.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import defaultdict, deque
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prefect_flux_kontext.callbacks.inbox import INBOX_FOLDER, Inbox
from prefect_flux_kontext.callbacks.recovery import recover_task
from prefect_flux_kontext.callbacks.tokens import Attempt
from prefect_flux_kontext.errors import LedgerError
from prefect_flux_kontext.ledger.store import RecordStore
from prefect_flux_kontext.models import utc_now

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence

    from prefect_flux_kontext.callbacks.inbox import Callback
    from prefect_flux_kontext.callbacks.options import CallbackOptions
    from prefect_flux_kontext.callbacks.requests import RequestCallbacks
    from prefect_flux_kontext.client.client import FluxKontextClient
    from prefect_flux_kontext.client.polling import PollingCadence, PollPauses
    from prefect_flux_kontext.ledger.ledger import Ledger
    from prefect_flux_kontext.ledger.records import Entry
    from prefect_flux_kontext.models import GenerationRequest

logger = logging.getLogger(__name__)

_LATE_CALLBACK_SECONDS = 5.0
"""Time after a row's end in which its callback still counts: the inbox is read every 2 s."""

_MISSED_WEIGHT = 0.1
_MAX_MISSED_SHARE = 0.5
"""Rows are polled if half of the last ten or so ended without a callback. The share is an
exponential average."""

INBOX_INTERVAL_SECONDS = 2.0
"""Seconds between two listings of an inbox."""

_READ_BATCH = 16
"""Files of callbacks that are read together."""

_REMEMBERED_TASKS = 20_000
"""Tasks of other rows, to recognize wrong callbacks: ten minutes of submits at full speed."""


@dataclass(eq=False, slots=True)
class _Row:
    attempt: Attempt
    submitted_at: float
    has_news: asyncio.Event = field(default_factory=asyncio.Event)
    task_ids: set[str] = field(default_factory=set)
    has_callback: bool = False
    has_ended: bool = False


class CallbackNotifications:
    """Received callbacks by row. Callbacks of attempts that are not expected are ignored.

    Attributes:
        is_reliable: Whether enough callbacks arrive that rows need not be polled.
    """

    def __init__(self) -> None:
        self.is_reliable = True
        self._missed_share = 0.0
        self._rows: dict[str, _Row] = {}

    def expect(self, attempt: Attempt, age: float = 0.0) -> None:
        """Accept callbacks of an attempt, whose submit is `age` seconds old."""
        row = self._rows.get(attempt.key)
        if row is None or row.attempt != attempt:
            submitted_at = asyncio.get_running_loop().time() - age
            self._rows[attempt.key] = _Row(attempt, submitted_at)

    def latest_attempt(self, key: str) -> tuple[Attempt, float] | None:
        """Return the attempt that is expected for a row and its age in seconds."""
        row = self._rows.get(key)
        if row is None:
            return None
        return row.attempt, asyncio.get_running_loop().time() - row.submitted_at

    def record_end(self, attempt: Attempt) -> None:
        """Note that the row has ended; its callbacks are forgotten after a few seconds."""
        row = self._rows.get(attempt.key)
        if row is not None and row.attempt == attempt and not row.has_ended:
            row.has_ended = True
            asyncio.get_running_loop().call_later(_LATE_CALLBACK_SECONDS, self._forget, row)

    def is_expected(self, attempt: Attempt) -> bool:
        """Whether callbacks of the attempt count: it is in progress or has just ended."""
        return self._row(attempt) is not None

    def is_over(self, attempt: Attempt) -> bool:
        """Whether a callback of the attempt is of no more use."""
        row = self._row(attempt)
        return row is None or row.has_ended

    def record_callback(self, attempt: Attempt, task_id: str | None) -> None:
        """Record a callback and wake the row that waits for it."""
        row = self._row(attempt)
        if row is None:
            return
        row.has_callback = True
        if task_id is not None:
            row.task_ids.add(task_id)
        row.has_news.set()

    def has_callback(self, attempt: Attempt) -> bool:
        """Whether a callback of the attempt has arrived."""
        row = self._row(attempt)
        return row is not None and row.has_callback

    def task_ids(self, attempt: Attempt) -> list[str]:
        """Return the tasks that callbacks of the attempt name; more than one is an error."""
        row = self._row(attempt)
        return sorted(row.task_ids) if row else []

    async def wait(self, attempt: Attempt, seconds: float = math.inf) -> bool:
        """Wait for the next callback of the attempt; return False if none arrives in time."""
        row = self._row(attempt)
        if row is None:
            return False
        try:
            async with asyncio.timeout(None if seconds == math.inf else max(0.0, seconds)):
                await row.has_news.wait()
        except TimeoutError:
            return False
        row.has_news.clear()
        return True

    def _row(self, attempt: Attempt) -> _Row | None:
        row = self._rows.get(attempt.key)
        return row if row is not None and row.attempt == attempt else None

    def _forget(self, row: _Row) -> None:
        if self._rows.get(row.attempt.key) is row:
            del self._rows[row.attempt.key]
        self._missed_share += _MISSED_WEIGHT * ((not row.has_callback) - self._missed_share)
        is_reliable = self._missed_share < _MAX_MISSED_SHARE
        if is_reliable != self.is_reliable:
            self.is_reliable = is_reliable
            logger.warning(
                "Callbacks arrive again, so rows wait for them instead of polling."
                if is_reliable
                else "Rows end without a callback, so they are polled until callbacks arrive "
                "again. Check that the receiver can be reached from outside at its public URL."
            )


class InboxWatcher:
    """Passes callbacks from the inbox to the rows, and removes files whose rows have ended.

    Args:
        inbox: Where callbacks are stored.
        notifications: Where the callbacks go.
        owner: This run. Callbacks of other runs count only for attempts that were claimed.
    """

    def __init__(self, inbox: Inbox, notifications: CallbackNotifications, owner: str) -> None:
        self._inbox = inbox
        self._notifications = notifications
        self._owner = owner
        self._files: defaultdict[str, dict[str, set[Attempt]]] = defaultdict(dict)
        self._unclaimed: defaultdict[Attempt, list[str | None]] = defaultdict(list)
        self._claimed: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._damaged: set[str] = set()

    async def watch(self) -> None:
        """Read new files every 2 s and remove those of ended rows, until cancelled."""
        while True:
            await asyncio.sleep(INBOX_INTERVAL_SECONDS)
            for owner in (self._owner, *self._claimed):
                await self._read_new_files(owner)
            await self.remove_ended()

    async def claim(self, attempt: Attempt) -> None:
        """Accept callbacks of an attempt that an ended run has made."""
        if attempt.owner == self._owner:
            return
        async with self._claimed[attempt.owner]:
            if attempt.owner not in self._files:
                self._files[attempt.owner] = {}
                await self._read_new_files(attempt.owner)
        for task_id in self._unclaimed.pop(attempt, ()):
            self._notifications.record_callback(attempt, task_id)

    def add_file(self, owner: str, name: str, callbacks: Sequence[Callback]) -> None:
        """Add a file of callbacks that was just written or read."""
        self._files[owner][name] = {callback.attempt for callback in callbacks}
        for callback in callbacks:
            attempt = callback.attempt
            if owner == self._owner or self._notifications.is_expected(attempt):
                self._notifications.record_callback(attempt, callback.task_id)
            else:
                self._unclaimed[attempt].append(callback.task_id)

    async def remove_ended(self) -> None:
        """Remove files of which all rows have ended."""
        files = self._files[self._owner]
        ended = [
            name for name, rows in files.items() if all(map(self._notifications.is_over, rows))
        ]
        for name in ended:
            try:
                await self._inbox.remove(self._owner, name)
            except LedgerError as error:
                logger.warning("A callback file could not be removed: %s", error)
                return
            del files[name]

    async def clear(self, owners: Iterable[str]) -> None:
        """Remove the callbacks of ended runs, whose rows are settled or belong to this run now."""
        for owner in owners:
            try:
                for name in await self._inbox.list_names(owner):
                    await self._inbox.remove(owner, name)
            except LedgerError as error:
                logger.warning("The callbacks of an ended run could not be removed: %s", error)

    async def _read_new_files(self, owner: str) -> None:
        try:
            names = await self._inbox.list_names(owner)
            new = [name for name in names if name not in self._files[owner]]
            for start in range(0, len(new), _READ_BATCH):
                block = new[start : start + _READ_BATCH]
                await asyncio.gather(*(self._read(owner, name) for name in block))
        except LedgerError as error:
            # Rows are also polled now and then.
            logger.warning("The inbox of callbacks could not be read: %s", error)

    async def _read(self, owner: str, name: str) -> None:
        try:
            callbacks = await self._inbox.read(owner, name)
        except LedgerError as error:
            if name not in self._damaged:
                self._damaged.add(name)
                logger.warning("%s", error)
            return
        if name not in self._files[owner]:  # this process may have received it meanwhile
            self.add_file(owner, name, callbacks)


@asynccontextmanager
async def open_callback_session(
    options: CallbackOptions, client: FluxKontextClient, ledger: Ledger
) -> AsyncIterator[CallbackSession]:
    """Open the callback session of a batch, with a receiver if the options have an address.

    Without a URL, rows are polled, but callbacks of ended runs still settle unknown rows.

    Raises:
        ConfigurationError: The receiver cannot listen on its address.
    """
    store = RecordStore(options.inbox) if options.inbox else ledger.store.below(INBOX_FOLDER)
    inbox, notifications = Inbox(store), CallbackNotifications()
    watcher = InboxWatcher(inbox, notifications, ledger.owner)
    session = CallbackSession(options, client, ledger, notifications, watcher)
    if options.url is None:
        yield session
        return
    async with AsyncExitStack() as stack:
        if options.listen is not None:
            # Imported here because the server is slow to import.
            from prefect_flux_kontext.callbacks.receiver import (  # noqa: PLC0415
                create_receiver,
                serve_in_background,
            )

            inbox.on_kept = watcher.add_file
            receiver = create_receiver(inbox, options.secret)
            url = await stack.enter_async_context(serve_in_background(receiver, *options.listen))
            logger.info("Receiving callbacks on %s.", url)
        watching = asyncio.create_task(watcher.watch())
        try:
            yield session
        finally:
            watching.cancel()
            await asyncio.wait({watching})
            await watcher.remove_ended()


class CallbackSession:
    """Adds callbacks to a batch: to requests, to polling and to unknown rows.

    Args:
        options: How callbacks are received.
        client: The client that confirms tasks.
        ledger: The ledger of the batch.
        notifications: The received callbacks.
        watcher: The watcher that reads them from the inbox.
    """

    def __init__(
        self,
        options: CallbackOptions,
        client: FluxKontextClient,
        ledger: Ledger,
        notifications: CallbackNotifications,
        watcher: InboxWatcher,
    ) -> None:
        self._options = options
        self._client = client
        self._ledger = ledger
        self._notifications = notifications
        self._watcher = watcher
        self._unknown: set[Attempt] = set()
        self._tasks: deque[str] = deque(maxlen=_REMEMBERED_TASKS)

    def prepare_request(self, request: GenerationRequest, entry: Entry) -> GenerationRequest:
        """Return the request of a claimed attempt with its callback URL.

        The URL is a secret: send it in the POST only, never log or store it.
        """
        attempt = get_attempt(entry)
        if self._options.url is not None:
            self._notifications.expect(attempt)
        return self._options.add_url(request, attempt)

    def pauses(self, entry: Entry, cadence: PollingCadence) -> PollPauses | None:
        """Return the pauses between polls of an accepted task; None for the cadence's own."""
        attempt = get_attempt(entry)
        self._tasks.append(entry.task.task_id)
        if self._notifications.is_expected(attempt):
            return CallbackPauses(self._notifications, attempt, cadence, self._options.sweep)
        return None

    def mark_ended(self, entry: Entry) -> None:
        """Note that the row's task has ended, and report callbacks that name other tasks."""
        attempt = get_attempt(entry)
        others = [
            name for name in self._notifications.task_ids(attempt) if name != entry.task.task_id
        ]
        if others:
            logger.error(
                "Row %s is task %s, but its callbacks also name %s. Check in the account's "
                "history whether the row was billed twice.",
                entry.key,
                entry.task.task_id,
                ", ".join(others),
            )
        self._notifications.record_end(attempt)

    async def recover(self, entry: Entry) -> Entry | None:
        """Recover the task of an unknown row from its callback; return None if there is none yet.

        Args:
            entry: A row whose latest attempt has no outcome on record.

        Raises:
            LedgerError: The task cannot be recorded.
        """
        attempt = get_attempt(entry)
        age = (utc_now() - entry.intent.at).total_seconds() if entry.intent else 0.0
        self._notifications.expect(attempt, max(0.0, age))
        await self._watcher.claim(attempt)
        self._unknown.add(attempt)
        named = self._notifications.task_ids(attempt)
        recovered = await recover_task(self._client, self._ledger, entry, named, self._tasks)
        if recovered is not None:
            self._unknown.discard(attempt)
        return recovered

    def may_be_called(self, key: str) -> bool:
        """Whether a callback may still settle the row."""
        return self._remaining_seconds(key) > 0

    async def wait_for_news(self, key: str) -> None:
        """Wait for the next callback of an unknown row, at most until its grace period ends."""
        expected = self._notifications.latest_attempt(key)
        if expected is not None:
            await self._notifications.wait(expected[0], self._remaining_seconds(key))

    async def clear(self, owners: Iterable[str]) -> None:
        """Remove the callbacks of ended runs that have no unknown row left."""
        await self._watcher.clear(set(owners) - {attempt.owner for attempt in self._unknown})

    def _remaining_seconds(self, key: str) -> float:
        expected = self._notifications.latest_attempt(key)
        if self._options.url is None or expected is None:
            return 0.0
        return max(0.0, self._options.grace - expected[1])


class CallbackPauses:
    """Pauses that a callback ends. While callbacks are reliable, polls without one are rare."""

    def __init__(
        self,
        notifications: CallbackNotifications | RequestCallbacks,
        attempt: Attempt,
        cadence: PollingCadence,
        sweep: float,
    ) -> None:
        self._notifications = notifications
        self._attempt = attempt
        self._cadence = cadence
        self._sweep = sweep
        self._unconfirmed = 0

    async def before_first_poll(self, age: float) -> None:
        """Wait for a callback, at most until the first poll or sweep is due."""
        longest = self._sweep if self._notifications.is_reliable else self._cadence.initial_delay
        if self._notifications.has_callback(self._attempt):
            longest = 0.0
        await self._notifications.wait(self._attempt, longest - age)

    async def before_next_poll(self) -> None:
        """Wait for a callback; after one that was too early, poll soon, then less often."""
        longest = self._sweep if self._notifications.is_reliable else self._cadence.interval
        if self._notifications.has_callback(self._attempt):
            soon = self._cadence.interval * 2**self._unconfirmed
            longest = min(longest, soon)
            self._unconfirmed = min(self._unconfirmed + 1, 16)
        await self._notifications.wait(self._attempt, longest)


def get_attempt(entry: Entry) -> Attempt:
    """Return the latest attempt of a row, as its callbacks name it."""
    owner = entry.intent.owner if entry.intent else ""
    return Attempt(owner, entry.key, entry.attempt)
