"""Small records on any fsspec filesystem: created once, read back, listed.

Exclusive creation is the only coordination. It decides between processes and machines on local
disks (a hard link), on S3 and compatible stores (`If-None-Match`), on GCS and Azure (likewise,
through their fsspec filesystems) and, within one process, in memory.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from prefect_flux_kontext.client.retry import jittered_backoff
from prefect_flux_kontext.errors import LedgerError
from prefect_flux_kontext.storage.atomic import create_file, replace_file
from prefect_flux_kontext.storage.errors import describe_error, is_transient, is_unsupported
from prefect_flux_kontext.storage.filesystem import OutputFolder

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

LEDGER_FOLDER = "_ledger"
"""The ledger's folder below the output."""

# A row needs four small requests of 20 to 100 ms on an object store; at 33 rows a second that
# is 3 to 13 at a time.
_EXECUTOR = ThreadPoolExecutor(32, thread_name_prefix="flux-kontext-records")
_MAX_ATTEMPTS = 4
"""Tries of one store operation; transient errors are retried for longer."""
_BACKOFF_SECONDS = 0.5


class RecordStore:
    """Records by name below one root.

    Only "file not found" means absent. Any other error is retried, four times in all or for a
    minute if the store is only busy, and then raised with the record's name. An outage that was
    taken for an absent record would lead to a second payment.

    Args:
        root: The folder, or its fsspec URL or local path.
    """

    def __init__(self, root: OutputFolder | str) -> None:
        self._folder = folder = OutputFolder(root)
        self._fs, self._root, self._options = folder.fs, folder.root.rstrip("/"), folder.options

    @property
    def fs(self) -> Any:
        """The fsspec filesystem."""
        return self._fs

    def __str__(self) -> str:
        return str(self._fs.unstrip_protocol(self._root))

    def below(self, name: str) -> RecordStore:
        """Return the records of a folder below this one, on the same filesystem."""
        return RecordStore(self._folder.below(name))

    async def create(self, name: str, data: bytes) -> bool:
        """Create a record atomically; return False if one of that name exists already.

        When a creation is retried after a lost reply, the record may exist because of the first
        try. So an existing record is read back: the same bytes mean that it is ours.

        Raises:
            LedgerError: The store could not be written to.
        """
        try:
            await self._run(
                name, lambda: create_file(self._fs, self._path(name), data), FileExistsError
            )
        except FileExistsError:
            return await self.read(name) == data
        return True

    async def read(
        self, name: str, start: int | None = None, end: int | None = None
    ) -> bytes | None:
        """Return the bytes of a record, or those from `start` to `end`; None if there is none.

        Raises:
            LedgerError: The store could not be read.
        """
        try:
            data: bytes = await self._run(
                name,
                lambda: self._fs.cat_file(self._path(name), start=start, end=end),
                FileNotFoundError,
            )
        except FileNotFoundError:
            return None
        return data

    async def replace(self, name: str, data: bytes) -> None:
        """Write a record atomically, over any older one.

        Raises:
            LedgerError: The store could not be written to.
        """
        await self._run(name, lambda: replace_file(self._fs, self._path(name), data))

    async def remove(self, name: str) -> None:
        """Remove a record; do nothing if there is none.

        Raises:
            LedgerError: The store could not be written to, or refuses to remove the record.
        """
        try:
            await self._run(
                name,
                lambda: self._fs.rm_file(self._path(name)),
                FileNotFoundError,
                PermissionError,
            )
        except FileNotFoundError:
            return
        except PermissionError as error:
            problem = describe_error(error, self._options)
            raise LedgerError(f"{self}/{name} may not be removed: {problem}") from None

    async def discard(self, name: str) -> None:
        """Remove a record, or empty it where the store does not allow to remove it.

        Raises:
            LedgerError: The store could not be written to.
        """
        try:
            await self.remove(name)
        except LedgerError:
            await self.replace(name, b"")

    async def list_names(self, folder: str) -> list[str]:
        """Return the names of the records in a folder, sorted, without the folder's own.

        Raises:
            LedgerError: The store could not be read.
        """
        path = self._path(folder)
        try:
            found = await self._run(
                folder, lambda: self._fs.ls(path, detail=False), FileNotFoundError
            )
        except FileNotFoundError:
            return []
        names = (str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in found)
        return sorted(name for name in names if not name.startswith("."))

    def _path(self, name: str) -> str:
        if ".." in name.split("/"):
            raise LedgerError(f"The record name {name!r} leads out of {self}.")
        return f"{self._root}/{name}"

    async def _run(
        self,
        name: str,
        action: Callable[[], T],
        *passes: type[FileExistsError | FileNotFoundError | PermissionError],
    ) -> T:
        """Run a blocking action in a thread and retry it, except on the errors in `passes`."""
        loop = asyncio.get_running_loop()
        began, attempt = loop.time(), 0
        while True:
            attempt += 1
            try:
                return await loop.run_in_executor(_EXECUTOR, action)
            except passes:
                raise
            except Exception as error:  # noqa: BLE001 - each filesystem has errors of its own
                again = is_transient(error, attempt, loop.time() - began) or (
                    attempt < _MAX_ATTEMPTS and not is_unsupported(error)
                )
                problem = describe_error(error, self._options)
                if isinstance(error, PermissionError):
                    problem += (
                        ". Without the permission to list (on S3: s3:ListBucket), a store also "
                        "refuses to read what does not exist"
                    )
            if not again:
                attempts = "1 attempt" if attempt == 1 else f"{attempt} attempts"
                raise LedgerError(
                    f"The ledger record {self}/{name} could not be reached after {attempts}: "
                    f"{problem}"
                )
            await asyncio.sleep(jittered_backoff(attempt, base=_BACKOFF_SECONDS))


def open_ledger_store(output: OutputFolder) -> RecordStore:
    """Open the records of an output's ledger, which are stored beside the images."""
    return RecordStore(output.below(LEDGER_FOLDER))
