"""Callbacks of single requests, whose waits may be in any thread of a process.

The waits share what is read of the inbox, so it is listed every two seconds however many wait. A
collection or a batch on the same ledger removes the files.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from prefect_flux_kontext.callbacks.inbox import INBOX_FOLDER, Inbox
from prefect_flux_kontext.callbacks.recovery import recover_task
from prefect_flux_kontext.callbacks.session import (
    INBOX_INTERVAL_SECONDS,
    CallbackPauses,
    get_attempt,
)
from prefect_flux_kontext.errors import LedgerError
from prefect_flux_kontext.ledger.store import RecordStore
from prefect_flux_kontext.models import GenerationRequest, utc_now

if TYPE_CHECKING:
    from prefect_flux_kontext.callbacks.options import CallbackOptions
    from prefect_flux_kontext.callbacks.tokens import Attempt
    from prefect_flux_kontext.client.client import FluxKontextClient
    from prefect_flux_kontext.client.polling import PollingCadence, PollPauses
    from prefect_flux_kontext.ledger.ledger import Ledger
    from prefect_flux_kontext.ledger.records import Entry

logger = logging.getLogger(__name__)


@dataclass
class _Folder:
    """What this process has read of the callbacks for one owner."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    next_read: float = -math.inf
    files: set[str] = field(default_factory=set)
    task_ids: dict[Attempt, set[str]] = field(default_factory=dict)
    has_missed: bool = False


_folders: dict[tuple[str, str], _Folder] = {}


class RequestCallbacks:
    """Adds callbacks to single requests: to submits, to polling and to lost replies.

    The receiver runs in another process.
    """

    is_reliable = True
    """While one is not missed; then `pauses` returns None."""

    def __init__(self, options: CallbackOptions, ledger: RecordStore) -> None:
        self._options = options
        store = RecordStore(options.inbox) if options.inbox else ledger.below(INBOX_FOLDER)
        self._inbox = Inbox(store)

    def prepare_request(self, request: GenerationRequest, entry: Entry) -> GenerationRequest:
        """Return the request of a claimed attempt with its callback URL, which is a secret."""
        return self._options.add_url(request, get_attempt(entry))

    def pauses(self, entry: Entry, cadence: PollingCadence) -> PollPauses | None:
        """Return the pauses between polls of an accepted task; None for the cadence's own."""
        attempt = get_attempt(entry)
        # One missed callback is enough: a single request is worth no minute of waiting.
        is_polled = self._options.url is None or entry.intent is None
        if is_polled or self._get_folder(attempt).has_missed:
            return None
        has_callback, wait = partial(self.has_callback, attempt), partial(self.wait, attempt)
        return CallbackPauses(self, has_callback, wait, cadence, self._options.sweep)

    def mark_ended(self, entry: Entry) -> None:
        """Note that the task has ended: without a callback, later ones are polled."""
        attempt = get_attempt(entry)
        self._get_folder(attempt).has_missed = not self.has_callback(attempt)

    async def recover(
        self, client: FluxKontextClient, ledger: Ledger, entry: Entry
    ) -> Entry | None:
        """Return the request with the task that its callback names, or None without one.

        Its latest attempt has no outcome on record. A callback is waited for until the grace
        period after the submit is over.

        Raises:
            LedgerError: The task cannot be recorded.
        """
        attempt = get_attempt(entry)
        age = (utc_now() - entry.intent.at).total_seconds() if entry.intent else math.inf
        await self.wait(attempt, self._options.grace - age if self._options.url else 0)
        named = self._get_folder(attempt).task_ids.get(attempt, set())
        return await recover_task(client, ledger, entry, named, ())

    def has_callback(self, attempt: Attempt) -> bool:
        """Whether a callback of the attempt has arrived."""
        return attempt in self._get_folder(attempt).task_ids

    async def wait(self, attempt: Attempt, seconds: float) -> bool:
        """Wait for the first callback of the attempt; return False if none arrives in time.

        After the first one, this waits for the given time.
        """
        loop = asyncio.get_running_loop()
        end, had_callback = loop.time() + seconds, self.has_callback(attempt)
        while True:
            await self._read_new_files(attempt)
            if self.has_callback(attempt) > had_callback:
                return True
            remaining = end - loop.time()
            if remaining <= 0:
                return False
            await asyncio.sleep(min(remaining, INBOX_INTERVAL_SECONDS))

    async def _read_new_files(self, attempt: Attempt) -> None:
        folder, owner = self._get_folder(attempt), attempt.owner
        now = asyncio.get_running_loop().time()
        if now < folder.next_read or not folder.lock.acquire(blocking=False):
            return
        try:
            folder.next_read = now + INBOX_INTERVAL_SECONDS
            for name in set(await self._inbox.list_names(owner)) - folder.files:
                folder.files.add(name)
                for callback in await self._inbox.read(owner, name):
                    named = folder.task_ids.setdefault(callback.attempt, set())
                    if callback.task_id is not None:
                        named.add(callback.task_id)
        except LedgerError as error:
            # Requests are also polled now and then.
            logger.warning("The inbox of callbacks could not be read: %s", error)
        finally:
            folder.lock.release()

    def _get_folder(self, attempt: Attempt) -> _Folder:
        return _folders.setdefault((str(self._inbox), attempt.owner), _Folder())
