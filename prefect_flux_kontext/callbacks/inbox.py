"""Durable storage of callbacks on any fsspec filesystem.

Each run has its own folder of JSON Lines files, with one callback a line. A file stays until its
rows have ended, so a folder holds little more than the callbacks of running rows.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from prefect_flux_kontext.callbacks.tokens import Attempt
from prefect_flux_kontext.errors import LedgerError
from prefect_flux_kontext.ledger.records import RECORD_VERSION, RecordVersion
from prefect_flux_kontext.models import utc_now

if TYPE_CHECKING:
    from prefect_flux_kontext.ledger.store import RecordStore

INBOX_FOLDER = "callbacks"
"""The folder of callbacks inside an output's ledger, unless another inbox is configured."""


class Callback(BaseModel):
    """A received callback. It is a hint until the service confirms it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: RecordVersion = RECORD_VERSION
    owner: str
    key: str
    number: int
    task_id: str | None = None

    @property
    def attempt(self) -> Attempt:
        """The attempt that the callback's URL named."""
        return Attempt(self.owner, self.key, self.number)


class Inbox:
    """Stores callbacks and reads them back. Its methods raise LedgerError.

    Callbacks that arrive while a file is being written share the next file, so a slow filesystem
    makes larger files and not a longer queue. `on_kept` gets run, name and callbacks of each file
    that this inbox has written.
    """

    def __init__(self, store: RecordStore) -> None:
        self.on_kept: Callable[[str, str, Sequence[Callback]], None] | None = None
        self._store = store
        self._pending: defaultdict[str, list[tuple[Callback, asyncio.Future[None]]]]
        self._pending = defaultdict(list)
        self._writers: dict[str, asyncio.Task[None]] = {}

    def __str__(self) -> str:
        return str(self._store)

    async def keep(self, callback: Callback) -> None:
        """Store a callback; return once it is durable."""
        written = asyncio.get_running_loop().create_future()
        self._pending[callback.owner].append((callback, written))
        if callback.owner not in self._writers:
            self._writers[callback.owner] = asyncio.create_task(self._write(callback.owner))
        await written

    async def list_names(self, owner: str) -> list[str]:
        """Return the names of a run's files."""
        return await self._store.list_names(owner)

    async def read(self, owner: str, name: str) -> list[Callback]:
        """Return the callbacks in a file; an empty list if the file is gone."""
        data = await self._store.read(f"{owner}/{name}")
        try:
            return [Callback.model_validate_json(line) for line in (data or b"").splitlines()]
        except ValidationError:
            raise LedgerError(
                f"The callback file {self}/{owner}/{name} is damaged. Remove it: the service "
                "reports the same results when it is polled."
            ) from None

    async def remove(self, owner: str, name: str) -> None:
        """Remove a file whose rows have ended."""
        await self._store.discard(f"{owner}/{name}")

    async def _write(self, owner: str) -> None:
        try:
            while pending := self._pending.pop(owner, None):
                callbacks = [callback for callback, _ in pending]
                name = f"{utc_now():%Y%m%dT%H%M%S.%f}-{secrets.token_hex(4)}.jsonl"
                lines = [callback.model_dump_json(exclude_none=True) for callback in callbacks]
                failure = None
                try:
                    await self._store.create(f"{owner}/{name}", "\n".join(lines).encode())
                except LedgerError as error:
                    failure = error
                else:
                    if self.on_kept is not None:
                        self.on_kept(owner, name, callbacks)
                for _, written in pending:
                    if written.done():  # its waiter was cancelled
                        continue
                    if failure is None:
                        written.set_result(None)
                    else:
                        written.set_exception(failure)
        finally:
            del self._writers[owner]
