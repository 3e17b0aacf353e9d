"""Small records on any fsspec filesystem: created once, read back, listed.

Exclusive creation is all the coordination there is. It decides between processes and machines
on local disks (a hard link), S3 and its like (`If-None-Match`), GCS and Azure (likewise, by
their fsspec filesystems) and, within one process, in memory.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from prefect_flux_kontext.client.retry import jittered_backoff
from prefect_flux_kontext.errors import LedgerError
from prefect_flux_kontext.storage.atomic import create_file, replace_file
from prefect_flux_kontext.storage.errors import describe_error, is_transient
from prefect_flux_kontext.storage.filesystem import OutputFolder

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

# A row needs four small requests of 20 to 100 ms on an object store; at 33 rows a second that
# is 3 to 13 at a time.
_THREADS = ThreadPoolExecutor(32, thread_name_prefix="flux-kontext-records")
_ATTEMPTS = 4


class RecordStore:
    """Records by name under one root.

    Only "there is no such file" means absent. Everything else that goes wrong is tried four
    times, or for a minute where the store is only too busy, and then raised, naming the record:
    an outage read as absence would be paid for.

    Args:
        root: The folder, or its fsspec URL or local path.
    """

    def __init__(self, root: OutputFolder | str) -> None:
        self._folder = folder = OutputFolder(root)
        self._fs, self._root, self._options = folder.fs, folder.root.rstrip("/"), folder.options

    def __str__(self) -> str:
        return str(self._fs.unstrip_protocol(self._root))

    def below(self, name: str) -> RecordStore:
        """The records of a folder in this one, on the same filesystem."""
        return RecordStore(self._folder.below(name))

    async def create(self, name: str, data: bytes) -> bool:
        """Create a record, whole or not at all; False where there is one of that name already.

        A creation whose reply was lost may find itself there when it is tried again, so the
        record is read back: the same bytes are ours.

        Raises:
            LedgerError: The store could not be written to.
        """
        try:
            await self._tried(
                name, lambda: create_file(self._fs, self._path(name), data), FileExistsError
            )
        except FileExistsError:
            return await self.read(name) == data
        return True

    async def read(self, name: str) -> bytes | None:
        """The bytes of a record, or None where there is none.

        Raises:
            LedgerError: The store could not be read.
        """
        try:
            data: bytes = await self._tried(
                name, lambda: self._fs.cat_file(self._path(name)), FileNotFoundError
            )
        except FileNotFoundError:
            return None
        return data

    async def replace(self, name: str, data: bytes) -> None:
        """Write a record over an older one, whole or not at all.

        Raises:
            LedgerError: The store could not be written to.
        """
        await self._tried(name, lambda: replace_file(self._fs, self._path(name), data))

    async def remove(self, name: str) -> None:
        """Remove a record; one that is gone already is as well.

        Raises:
            LedgerError: The store could not be written to, or nothing may be removed there.
        """
        try:
            await self._tried(
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

    async def names(self, folder: str) -> list[str]:
        """The names of the records in a folder, sorted, without the folder.

        Raises:
            LedgerError: The store could not be read.
        """
        path = self._path(folder)
        try:
            found = await self._tried(
                folder, lambda: self._fs.ls(path, detail=False), FileNotFoundError
            )
        except FileNotFoundError:
            return []
        names = (str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in found)
        return sorted(name for name in names if not name.startswith("."))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    async def _tried(
        self,
        name: str,
        action: Callable[[], T],
        *passes: type[FileExistsError | FileNotFoundError | PermissionError],
    ) -> T:
        loop = asyncio.get_running_loop()
        began, attempt = loop.time(), 0
        while True:
            attempt += 1
            try:
                return await loop.run_in_executor(_THREADS, action)
            except passes:
                raise
            except Exception as error:  # noqa: BLE001 - each filesystem has errors of its own
                again = attempt < _ATTEMPTS or is_transient(error, attempt, loop.time() - began)
                problem = describe_error(error, self._options)
            if not again:
                raise LedgerError(
                    f"The ledger record {self}/{name} could not be reached after {attempt} "
                    f"attempts: {problem}"
                )
            await asyncio.sleep(jittered_backoff(attempt, base=0.5))


LEDGER_FOLDER = "_ledger"


def open_ledger_store(output: OutputFolder) -> RecordStore:
    """Where the ledger of an output is: beside the images."""
    return RecordStore(output.below(LEDGER_FOLDER))
