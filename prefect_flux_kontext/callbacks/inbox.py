"""Callbacks on record: durable before they are answered, on any fsspec filesystem.

A folder for each run that pays holds files of one or more callbacks, a line each. They stay until
their rows have ended, so a folder holds little more than what is under way.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import defaultdict
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from prefect_flux_kontext.callbacks.tokens import Attempt
from prefect_flux_kontext.errors import LedgerError
from prefect_flux_kontext.models import utc_now

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from prefect_flux_kontext.ledger.store import RecordStore

INBOX_FOLDER = "callbacks"
"""Where an output keeps callbacks, in its ledger, unless an inbox of its own is named."""


class Callback(BaseModel):
    """What a callback said; a hint, until the service has confirmed it.

    Attributes:
        owner: The run that made the attempt.
        key: The row key.
        number: The attempt's.
        task_id: The task that it told of, where it told one.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    owner: str
    key: str
    number: int
    task_id: str | None = None

    @property
    def attempt(self) -> Attempt:
        """The attempt that the callback's URL named."""
        return Attempt(self.owner, self.key, self.number)


class Inbox:
    """Keeps callbacks and gives them back.

    Those that come while a file is being written go into the next one together, so a slow
    filesystem makes files larger and not the queue.

    Args:
        store: Where the folders are.

    Attributes:
        on_kept: Told of each file that was written here: owner, name, callbacks.
    """

    def __init__(self, store: RecordStore) -> None:
        self.on_kept: Callable[[str, str, Sequence[Callback]], None] | None = None
        self._store = store
        self._next: defaultdict[str, list[tuple[Callback, asyncio.Future[None]]]]
        self._next = defaultdict(list)
        self._writers: dict[str, asyncio.Task[None]] = {}

    def __str__(self) -> str:
        return str(self._store)

    async def keep(self, callback: Callback) -> None:
        """Return as soon as the callback is durable.

        Raises:
            LedgerError: It could not be written.
        """
        kept = asyncio.get_running_loop().create_future()
        self._next[callback.owner].append((callback, kept))
        if callback.owner not in self._writers:
            self._writers[callback.owner] = asyncio.create_task(self._write(callback.owner))
        await kept

    async def names(self, owner: str) -> list[str]:
        """The names of the files of a run.

        Raises:
            LedgerError: They cannot be listed.
        """
        return await self._store.names(owner)

    async def read(self, owner: str, name: str) -> list[Callback]:
        """The callbacks in a file; none where it is gone.

        Raises:
            LedgerError: The file cannot be read or is damaged.
        """
        data = await self._store.read(f"{owner}/{name}")
        try:
            return [Callback.model_validate_json(line) for line in (data or b"").splitlines()]
        except ValidationError:
            raise LedgerError(
                f"The record of callbacks {self}/{owner}/{name} is damaged. Remove it: what it "
                "told, the service tells again when it is asked."
            ) from None

    async def remove(self, owner: str, name: str) -> None:
        """Remove a file whose rows have ended.

        Raises:
            LedgerError: It cannot be removed.
        """
        await self._store.remove(f"{owner}/{name}")

    async def _write(self, owner: str) -> None:
        try:
            while together := self._next.pop(owner, None):
                callbacks = [callback for callback, _ in together]
                name = f"{utc_now():%Y%m%dT%H%M%S.%f}-{secrets.token_hex(4)}.jsonl"
                lines = [told.model_dump_json(exclude_none=True) for told in callbacks]
                failure = None
                try:
                    await self._store.create(f"{owner}/{name}", "\n".join(lines).encode())
                except LedgerError as error:
                    failure = error
                else:
                    if self.on_kept is not None:
                        self.on_kept(owner, name, callbacks)
                for _, kept in together:
                    if kept.done():  # who waited has given up
                        continue
                    if failure is None:
                        kept.set_result(None)
                    else:
                        kept.set_exception(failure)
        finally:
            del self._writers[owner]
