"""What callbacks have told of the rows under way, and who waits to be told."""

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
from prefect_flux_kontext.callbacks.tokens import Attempt, create_token, validate_secret
from prefect_flux_kontext.errors import LedgerError
from prefect_flux_kontext.ledger.store import RecordStore
from prefect_flux_kontext.models import utc_now

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence

    from prefect_flux_kontext.callbacks.inbox import Callback
    from prefect_flux_kontext.callbacks.options import CallbackOptions
    from prefect_flux_kontext.client.client import FluxKontextClient
    from prefect_flux_kontext.client.polling import Pauses, PollingCadence
    from prefect_flux_kontext.ledger.ledger import Ledger
    from prefect_flux_kontext.ledger.records import Entry
    from prefect_flux_kontext.models import GenerationRequest

logger = logging.getLogger(__name__)

_STILL_IN_TIME = 5.0
"""Seconds after a row's end for which its callback counts as come: through the filesystem it may
be 2 s behind."""

_WEIGHT, _TOO_MANY_MISSED = 0.1, 0.5
"""Of the last ten rows that ended or so, the share without a callback from which on we poll."""


@dataclass(eq=False, slots=True)
class _Row:
    attempt: Attempt
    since: float
    came: asyncio.Event = field(default_factory=asyncio.Event)
    task_ids: set[str] = field(default_factory=set)
    heard: bool = False
    ended: bool = False


class CallbackNotifications:
    """Hints by row. A hint for a row or an attempt that nobody expects is none.

    Attributes:
        reliable: Whether callbacks come as they should, so that there is no need to poll.
    """

    def __init__(self) -> None:
        self.reliable = True
        self._missed_share = 0.0
        self._rows: dict[str, _Row] = {}

    def expect(self, attempt: Attempt, age: float = 0.0) -> None:
        """Let hints for an attempt count, which is being made or was `age` seconds ago."""
        row = self._rows.get(attempt.key)
        if row is None or row.attempt != attempt:
            since = asyncio.get_running_loop().time() - age
            self._rows[attempt.key] = _Row(attempt, since)

    def latest(self, key: str) -> tuple[Attempt, float] | None:
        """The attempt that is expected for a row, and its age in seconds."""
        row = self._rows.get(key)
        if row is None:
            return None
        return row.attempt, asyncio.get_running_loop().time() - row.since

    def ended(self, attempt: Attempt) -> None:
        """The row is over; its hints are forgotten in a few seconds."""
        row = self._rows.get(attempt.key)
        if row is not None and row.attempt == attempt and not row.ended:
            row.ended = True
            asyncio.get_running_loop().call_later(_STILL_IN_TIME, self._judge, row)

    def expected(self, attempt: Attempt) -> bool:
        """Whether hints for this attempt count: it is under way, or ended just now."""
        return self._row(attempt) is not None

    def is_over(self, attempt: Attempt) -> bool:
        """Whether nobody has any use for this hint any more."""
        row = self._row(attempt)
        return row is None or row.ended

    def hear(self, attempt: Attempt, task_id: str | None) -> None:
        """A callback has come."""
        row = self._row(attempt)
        if row is None:
            return
        row.heard = True
        if task_id is not None:
            row.task_ids.add(task_id)
        row.came.set()

    def heard(self, attempt: Attempt) -> bool:
        """Whether a callback has come for the attempt."""
        row = self._row(attempt)
        return row is not None and row.heard

    def task_ids(self, attempt: Attempt) -> list[str]:
        """The tasks that callbacks have named for the attempt; more than one is one too many."""
        row = self._row(attempt)
        return sorted(row.task_ids) if row else []

    async def wait(self, attempt: Attempt, seconds: float = math.inf) -> bool:
        """Wait for a hint that was not waited for before; False when none has come in time."""
        row = self._row(attempt)
        if row is None:
            return False
        try:
            async with asyncio.timeout(None if seconds == math.inf else max(0.0, seconds)):
                await row.came.wait()
        except TimeoutError:
            return False
        row.came.clear()
        return True

    def _row(self, attempt: Attempt) -> _Row | None:
        row = self._rows.get(attempt.key)
        return row if row is not None and row.attempt == attempt else None

    def _judge(self, row: _Row) -> None:
        if self._rows.get(row.attempt.key) is row:
            del self._rows[row.attempt.key]
        self._missed_share += _WEIGHT * ((not row.heard) - self._missed_share)
        reliable = self._missed_share < _TOO_MANY_MISSED
        if reliable != self.reliable:
            self.reliable = reliable
            logger.warning(
                "Callbacks come again: rows wait for them."
                if reliable
                else "Rows end without a callback: they are polled until callbacks come again. "
                "ReferenceInfo whether the receiver can be reached from outside at its public URL."
            )


_EVERY = 2.0
_READ_AT_ONCE = 16


class Watcher:
    """Takes callbacks from the inbox to the rows, and files away whose rows have ended.

    Args:
        inbox: Where callbacks are kept.
        hints: Where rows are told of them.
        owner: This run. Other runs' callbacks count only for the attempts that were claimed.
    """

    def __init__(self, inbox: Inbox, hints: CallbackNotifications, owner: str) -> None:
        self._inbox = inbox
        self._hints = hints
        self._owner = owner
        self._files: defaultdict[str, dict[str, set[Attempt]]] = defaultdict(dict)
        self._unclaimed: defaultdict[Attempt, list[str | None]] = defaultdict(list)
        self._claimed: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._damaged: set[str] = set()

    async def watch(self) -> None:
        """Look for new files for ever."""
        while True:
            await asyncio.sleep(_EVERY)
            for owner in (self._owner, *self._claimed):
                await self._look(owner)
            await self.remove_ended()

    async def claim(self, attempt: Attempt) -> None:
        """Tell the row what was heard of an attempt that an ended run has made."""
        if attempt.owner == self._owner:
            return
        async with self._claimed[attempt.owner]:
            if attempt.owner not in self._files:
                self._files[attempt.owner] = {}
                await self._look(attempt.owner)
        for task_id in self._unclaimed.pop(attempt, ()):
            self._hints.hear(attempt, task_id)

    def kept(self, owner: str, name: str, callbacks: Sequence[Callback]) -> None:
        """Take up a file of callbacks that has just been written or read."""
        self._files[owner][name] = {callback.attempt for callback in callbacks}
        for callback in callbacks:
            attempt = callback.attempt
            if owner == self._owner or self._hints.expected(attempt):
                self._hints.hear(attempt, callback.task_id)
            else:
                self._unclaimed[attempt].append(callback.task_id)

    async def remove_ended(self) -> None:
        """Remove the files of which every row has ended."""
        files = self._files[self._owner]
        over = [name for name, told in files.items() if all(map(self._hints.is_over, told))]
        for name in over:
            try:
                await self._inbox.remove(self._owner, name)
            except LedgerError as error:
                logger.warning("A record of callbacks stays where it is: %s", error)
                return
            del files[name]

    async def clear(self, owners: Iterable[str]) -> None:
        """Remove what ended runs were told: what they owed is settled, or the run's own by now."""
        for owner in owners:
            try:
                for name in await self._inbox.names(owner):
                    await self._inbox.remove(owner, name)
            except LedgerError as error:
                logger.warning("Callbacks of an ended run stay where they are: %s", error)

    async def _look(self, owner: str) -> None:
        try:
            names = await self._inbox.names(owner)
            new = [name for name in names if name not in self._files[owner]]
            for start in range(0, len(new), _READ_AT_ONCE):
                block = new[start : start + _READ_AT_ONCE]
                await asyncio.gather(*(self._read(owner, name) for name in block))
        except LedgerError as error:
            # Rows are looked at now and then in any case.
            logger.warning("Callbacks cannot be looked for: %s", error)

    async def _read(self, owner: str, name: str) -> None:
        try:
            callbacks = await self._inbox.read(owner, name)
        except LedgerError as error:
            if name not in self._damaged:
                self._damaged.add(name)
                logger.warning("%s", error)
            return
        if name not in self._files[owner]:  # received here meanwhile
            self.kept(owner, name, callbacks)


_REMEMBERED_TASKS = 20_000
"""Tasks of other rows to tell a false hint by: ten minutes of submits at full speed."""


@asynccontextmanager
async def open_callback_session(
    options: CallbackOptions, client: FluxKontextClient, ledger: Ledger
) -> AsyncIterator[CallbackSession]:
    """Be called back while the block runs; where there is no URL, poll.

    Without a URL too, what an ended run was told settles the rows that it left unknown.

    Raises:
        ConfigurationError: The address to receive callbacks on cannot be listened on.
    """
    store = RecordStore(options.inbox) if options.inbox else ledger.store.below(INBOX_FOLDER)
    inbox, hints = Inbox(store), CallbackNotifications()
    watcher = Watcher(inbox, hints, ledger.owner)
    mode = CallbackSession(options, client, ledger, hints, watcher)
    if options.url is None:
        yield mode
        return
    async with AsyncExitStack() as stack:
        if options.listen is not None:
            # Here, because they take a while to import.
            from prefect_flux_kontext.callbacks.receiver import (  # noqa: PLC0415
                create_receiver,
                serve_in_background,
            )

            inbox.on_kept = watcher.kept
            receiver = create_receiver(inbox, options.secret)
            url = await stack.enter_async_context(serve_in_background(receiver, *options.listen))
            logger.info("Callbacks are received on %s.", url)
        watching = asyncio.create_task(watcher.watch())
        try:
            yield mode
        finally:
            watching.cancel()
            await asyncio.wait({watching})
            await watcher.remove_ended()


class CallbackSession:
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
        hints: CallbackNotifications,
        watcher: Watcher,
    ) -> None:
        self._options = options
        self._secret = validate_secret(options.secret) if options.url else b""
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
        url = f"{self._options.url}/{create_token(self._secret, attempt)}"
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
        adopted = await recover_task(self._client, self._ledger, entry, named, self._tasks)
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
        self, hints: CallbackNotifications, attempt: Attempt, cadence: PollingCadence, sweep: float
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
