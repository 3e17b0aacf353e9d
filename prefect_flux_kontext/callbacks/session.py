"""Callbacks during a batch: `InboxWatcher` passes them from the inbox to the waiting rows."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prefect_flux_kontext.callbacks.inbox import INBOX_FOLDER, Callback, Inbox
from prefect_flux_kontext.callbacks.recovery import recover_task
from prefect_flux_kontext.callbacks.tokens import Attempt
from prefect_flux_kontext.errors import LedgerError
from prefect_flux_kontext.ledger.store import RecordStore
from prefect_flux_kontext.models import GenerationRequest, utc_now

if TYPE_CHECKING:
    from prefect_flux_kontext.callbacks.options import CallbackOptions
    from prefect_flux_kontext.callbacks.requests import RequestCallbacks
    from prefect_flux_kontext.client.client import FluxKontextClient
    from prefect_flux_kontext.client.polling import PollingCadence, PollPauses
    from prefect_flux_kontext.ledger.ledger import Ledger
    from prefect_flux_kontext.ledger.records import Entry

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
class AwaitedAttempt:
    """An attempt whose callbacks count, and what they have said so far."""

    attempt: Attempt
    submitted_at: float
    task_ids: set[str] = field(default_factory=set)
    has_callback: bool = False
    has_ended: bool = False
    _has_news: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def age(self) -> float:
        """Seconds since the submit."""
        return asyncio.get_running_loop().time() - self.submitted_at

    def record_callback(self, task_id: str | None) -> None:
        """Record a callback and wake the row that waits for it."""
        self.has_callback = True
        if task_id is not None:
            self.task_ids.add(task_id)
        self._has_news.set()

    async def wait(self, seconds: float) -> None:
        """Wait for the next callback, at most this long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, seconds)):
                await self._has_news.wait()
                self._has_news.clear()


class InboxWatcher:
    """Passes callbacks from the inbox to the rows, and removes files whose rows have ended.

    Callbacks count for attempts in progress, and for those that have just ended; those of other
    runs than `owner` only for attempts that were claimed. Rows need not be polled while callbacks
    are reliable.
    """

    def __init__(self, inbox: Inbox, owner: str) -> None:
        self.is_reliable = True
        self._inbox = inbox
        self._owner = owner
        self._missed_share = 0.0
        self._rows: dict[str, AwaitedAttempt] = {}
        self._files: defaultdict[str, dict[str, set[Attempt]]] = defaultdict(dict)
        self._unclaimed: defaultdict[Attempt, list[str | None]] = defaultdict(list)
        self._claimed: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._damaged: set[str] = set()

    def expect(self, attempt: Attempt, age: float = 0.0) -> AwaitedAttempt:
        """Accept callbacks of an attempt, whose submit is `age` seconds old."""
        row = self._rows.get(attempt.key)
        if row is None or row.attempt != attempt:
            submitted_at = asyncio.get_running_loop().time() - age
            row = self._rows[attempt.key] = AwaitedAttempt(attempt, submitted_at)
        return row

    def find(self, attempt: Attempt) -> AwaitedAttempt | None:
        """Return the attempt if its callbacks count."""
        row = self._rows.get(attempt.key)
        return row if row is not None and row.attempt == attempt else None

    def find_latest(self, key: str) -> AwaitedAttempt | None:
        """Return the attempt of a row whose callbacks count, if any."""
        return self._rows.get(key)

    def record_end(self, attempt: Attempt) -> None:
        """Note that the row has ended; its callbacks are forgotten after a few seconds."""
        row = self.find(attempt)
        if row is not None and not row.has_ended:
            row.has_ended = True
            asyncio.get_running_loop().call_later(_LATE_CALLBACK_SECONDS, self._forget, row)

    def _forget(self, row: AwaitedAttempt) -> None:
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
        row = self.find(attempt)
        for task_id in self._unclaimed.pop(attempt, ()):
            if row is not None:
                row.record_callback(task_id)

    def add_file(self, owner: str, name: str, callbacks: Sequence[Callback]) -> None:
        """Add a file of callbacks that was just written or read."""
        self._files[owner][name] = {callback.attempt for callback in callbacks}
        for callback in callbacks:
            row = self.find(callback.attempt)
            if row is not None:
                row.record_callback(callback.task_id)
            elif owner != self._owner:
                self._unclaimed[callback.attempt].append(callback.task_id)

    async def remove_ended(self) -> None:
        """Remove files of which all rows have ended."""
        files = self._files[self._owner]
        for name in [name for name, rows in files.items() if all(map(self._is_over, rows))]:
            try:
                await self._inbox.remove(self._owner, name)
            except LedgerError as error:
                logger.warning("A callback file could not be removed: %s", error)
                return
            del files[name]

    def _is_over(self, attempt: Attempt) -> bool:
        row = self.find(attempt)
        return row is None or row.has_ended

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
    """
    store = RecordStore(options.inbox) if options.inbox else ledger.store.below(INBOX_FOLDER)
    inbox = Inbox(store)
    watcher = InboxWatcher(inbox, ledger.owner)
    session = CallbackSession(options, client, ledger, watcher)
    if options.url is None:
        yield session
        return
    async with AsyncExitStack() as stack:
        if options.listen is not None:
            from prefect_flux_kontext.callbacks import receiver  # noqa: PLC0415 - slow to import

            inbox.on_kept = watcher.add_file
            app = receiver.create_receiver(inbox, options.secret)
            serving = receiver.serve_in_background(app, *options.listen)
            logger.info("Receiving callbacks on %s.", await stack.enter_async_context(serving))
        watching = asyncio.create_task(watcher.watch())
        try:
            yield session
        finally:
            watching.cancel()
            await asyncio.wait({watching})
            await watcher.remove_ended()


class CallbackSession:
    """Adds callbacks to a batch: to requests, to polling and to unknown rows."""

    def __init__(
        self,
        options: CallbackOptions,
        client: FluxKontextClient,
        ledger: Ledger,
        watcher: InboxWatcher,
    ) -> None:
        self._options = options
        self._client = client
        self._ledger = ledger
        self._watcher = watcher
        self._unknown: set[Attempt] = set()
        self._tasks: deque[str] = deque(maxlen=_REMEMBERED_TASKS)

    def prepare_request(self, request: GenerationRequest, entry: Entry) -> GenerationRequest:
        """Return the request of a claimed attempt with its callback URL.

        The URL is a secret: send it in the POST only, never log or store it.
        """
        attempt = get_attempt(entry)
        if self._options.url is not None:
            self._watcher.expect(attempt)
        return self._options.add_url(request, attempt)

    def pauses(self, entry: Entry, cadence: PollingCadence) -> PollPauses | None:
        """Return the pauses between polls of an accepted task; None for the cadence's own."""
        attempt = get_attempt(entry)
        self._tasks.append(entry.task.task_id)
        row = self._watcher.find(attempt)
        if row is None:
            return None
        sweep = self._options.sweep
        return CallbackPauses(self._watcher, lambda: row.has_callback, row.wait, cadence, sweep)

    def mark_ended(self, entry: Entry) -> None:
        """Note that the row's task has ended, and report callbacks that name other tasks."""
        attempt = get_attempt(entry)
        row = self._watcher.find(attempt)
        others = sorted(row.task_ids - {entry.task.task_id}) if row else ()
        if others:
            logger.error(
                "Row %s is task %s, but its callbacks also name %s. Check in the account's "
                "history whether the row was billed twice.",
                entry.key,
                entry.task.task_id,
                ", ".join(others),
            )
        self._watcher.record_end(attempt)

    async def recover(self, entry: Entry) -> Entry | None:
        """Recover the task of an unknown row from its callback, if there is one by now."""
        attempt = get_attempt(entry)
        age = (utc_now() - entry.intent.at).total_seconds() if entry.intent else 0.0
        row = self._watcher.expect(attempt, max(0.0, age))
        await self._watcher.claim(attempt)
        self._unknown.add(attempt)
        named = sorted(row.task_ids)
        recovered = await recover_task(self._client, self._ledger, entry, named, self._tasks)
        if recovered is not None:
            self._unknown.discard(attempt)
        return recovered

    def may_be_called(self, key: str) -> bool:
        """Whether a callback may still settle the row."""
        return self._remaining_seconds(key) > 0

    async def wait_for_news(self, key: str) -> None:
        """Wait for the next callback of an unknown row, at most until its grace period ends."""
        row = self._watcher.find_latest(key)
        if row is not None:
            await row.wait(self._remaining_seconds(key))

    async def clear(self, owners: Iterable[str]) -> None:
        """Remove the callbacks of ended runs that have no unknown row left."""
        await self._watcher.clear(set(owners) - {attempt.owner for attempt in self._unknown})

    def _remaining_seconds(self, key: str) -> float:
        row = self._watcher.find_latest(key)
        if self._options.url is None or row is None:
            return 0.0
        return max(0.0, self._options.grace - row.age)


@dataclass
class CallbackPauses:
    """Pauses that a callback ends. While callbacks are reliable, polls without one are rare."""

    source: InboxWatcher | RequestCallbacks
    has_callback: Callable[[], bool]
    wait: Callable[[float], Awaitable[object]]  # for the next callback, at most so long
    cadence: PollingCadence
    sweep: float
    unconfirmed: int = 0

    async def before_first_poll(self, age: float) -> None:
        """Wait for a callback, at most until the first poll or sweep is due."""
        longest = self.sweep if self.source.is_reliable else self.cadence.initial_delay
        if self.has_callback():
            longest = 0.0
        await self.wait(longest - age)

    async def before_next_poll(self) -> None:
        """Wait for a callback; after one that was too early, poll soon, then less often."""
        longest = self.sweep if self.source.is_reliable else self.cadence.interval
        if self.has_callback():
            longest = min(longest, self.cadence.interval * 2**self.unconfirmed)
            self.unconfirmed = min(self.unconfirmed + 1, 16)
        await self.wait(longest)


def get_attempt(entry: Entry) -> Attempt:
    """Return the latest attempt of a row, as its callbacks name it."""
    owner = entry.intent.owner if entry.intent else ""
    return Attempt(owner, entry.key, entry.attempt)
