"""Files in their place on any fsspec filesystem, such that no reader ever sees half of one."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self, TypeVar

import fsspec
import fsspec.config

from prefect_flux_kontext.client.retry import jittered_backoff
from prefect_flux_kontext.errors import ConfigurationError, StorageError
from prefect_flux_kontext.storage.atomic import copy_into_place, create_file, replace_file
from prefect_flux_kontext.storage.errors import describe_error, is_transient

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

T = TypeVar("T")
Data = TypeVar("Data", bytes, "Path")

# Apart from the ledger's and from asyncio's own, of which a small machine has five: a store that
# is slow to take images holds up neither records nor checks.
_THREADS = ThreadPoolExecutor(16, thread_name_prefix="flux-kontext-images")
_PROBE = ".probe"

# Of botocore's own 10, images would take some from the ledger, whose writes hold up submits.
_S3_CONNECTIONS = 48


def _s3_defaults(url: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What S3's filesystem is told where neither the options nor fsspec's settings say otherwise.

    As many connections as there are threads, and one request to read a small file, not two.
    """
    if not url.startswith(("s3://", "s3a://")):
        return {}
    given = {**fsspec.config.conf.get("s3", {}), **options}
    connections = {"max_pool_connections": _S3_CONNECTIONS, **given.get("config_kwargs", {})}
    return {"max_concurrency": given.get("max_concurrency", 1), "config_kwargs": connections}


class OutputFolder:
    """A folder or prefix to write to, given as an fsspec URL or a local path.

    Args:
        url: For example `out/`, `s3://bucket/prefix` or `memory://pictures`. Another folder is
            taken as it is.
        storage_options: What the filesystem needs to know, as its fsspec implementation names
            it: for S3 `endpoint_url`, `key`, `secret`, `profile`, …. They are never told again.

    Attributes:
        fs: The fsspec filesystem.
        root: The folder's path on it.
        options: What the filesystem was given; it may be secret.

    Raises:
        ConfigurationError: There is no such kind of filesystem here, or the URL chains several,
            or the options are not the filesystem's.
    """

    fs: Any
    root: str
    options: dict[str, Any]

    def __init__(
        self,
        url: OutputFolder | str | os.PathLike[str],
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        if isinstance(url, OutputFolder):
            self.fs, self.root, self.options = url.fs, url.root, url.options
            return
        location = os.fspath(url)
        if "::" in location or not location.strip():
            raise ConfigurationError(f"The output {location!r} is not one folder or URL.")
        self.options = dict(storage_options or {})
        # What another run has written is to be seen, so nothing that was listed is kept.
        options = {
            **self.options,
            **_s3_defaults(location, self.options),
            "use_listings_cache": False,
        }
        problem = None
        try:
            self.fs, root = fsspec.core.url_to_fs(location, **options)
        except Exception as error:  # noqa: BLE001 - each filesystem has errors of its own
            problem = describe_error(error, self.options)
        if problem:
            raise ConfigurationError(f"The output {location!r} cannot be used: {problem}")
        self.root = str(root)

    def __str__(self) -> str:
        return str(self.fs.unstrip_protocol(self.root))

    def below(self, name: str) -> Self:
        """A folder in this one, on the same filesystem."""
        folder = copy.copy(self)
        folder.root = self._path(name)
        return folder

    async def write(self, name: str, data: bytes) -> str:
        """Put a whole file in place, over an older one of that name, and return its URI.

        Raises:
            StorageError: The filesystem refused; no half file is left to be seen.
        """
        return await self._write(replace_file, name, data)

    def uri(self, name: str) -> str:
        """The URI of a file here."""
        return str(self.fs.unstrip_protocol(self._path(name)))

    def relative(self, uri: str) -> str:
        """The name of a file that `write` put here, by its URI."""
        return uri.removeprefix(f"{self}/")

    async def write_unique(self, names: Sequence[str], data: bytes) -> str:
        """Put a file under the first name that is free or holds these bytes, and return its URI.

        Args:
            names: From the wanted name to one that nothing else has, which is written over.
            data: The whole file.

        Raises:
            StorageError: The filesystem refused.
        """
        for name in names[:-1]:
            try:
                return await self._write(create_file, name, data, FileExistsError)
            except FileExistsError:
                if await self.read(name) == data:
                    return self.uri(name)
        return await self.write(names[-1], data)

    async def read(self, name: str) -> bytes | None:
        """The bytes of a file, or None where there is none.

        Raises:
            StorageError: The filesystem refused.
        """
        try:
            return await self._call(
                f"{self.uri(name)} cannot be read",
                lambda: bytes(self.fs.cat_file(self._path(name))),
                FileNotFoundError,
            )
        except FileNotFoundError:
            return None

    async def put(self, name: str, source: Path) -> str:
        """Put a file of this machine in place, over an older one, and return its URI.

        Raises:
            StorageError: The filesystem refused; no half file is left to be seen.
        """
        return await self._write(copy_into_place, name, source)

    async def fetch(self, name: str, target: Path) -> bool:
        """Copy a file to this machine; False where there is none.

        Raises:
            StorageError: The filesystem refused.
        """
        try:
            await self._call(
                f"{self.uri(name)} cannot be read",
                lambda: self.fs.get_file(self._path(name), str(target)),
                FileNotFoundError,
            )
        except FileNotFoundError:
            # Some filesystems have made an empty one by then.
            await asyncio.to_thread(target.unlink, missing_ok=True)
            return False
        return True

    async def exists(self, name: str) -> bool:
        """Whether a file is there.

        Raises:
            StorageError: The filesystem refused.
        """
        return await self._call(
            f"{self.uri(name)} cannot be looked for",
            lambda: bool(self.fs.exists(self._path(name))),
        )

    async def remove(self, name: str) -> None:
        """Remove a file, if there is one.

        Raises:
            StorageError: The filesystem refused.
        """
        with contextlib.suppress(FileNotFoundError):
            await self._call(
                f"{self.uri(name)} cannot be removed",
                lambda: self.fs.rm_file(self._path(name)),
                FileNotFoundError,
            )

    async def check_writable(self) -> None:
        """Write a small file, so that a wrong output is known before anything is paid.

        It is removed again, but nothing hangs on that: there are outputs where nobody may remove
        anything. Its name is always the same, so at most one is ever left.

        Raises:
            ConfigurationError: The folder cannot be written to.
        """
        try:
            await self.write(_PROBE, b"")
        except StorageError as error:
            raise ConfigurationError(f"{self} cannot be written to. {error}") from None
        with contextlib.suppress(StorageError):
            await self.remove(_PROBE)

    async def _write(
        self,
        how: Callable[[Any, str, Data], None],
        name: str,
        data: Data,
        *passes: type[FileExistsError],
    ) -> str:
        await self._call(
            f"The output refused {self.uri(name)}",
            lambda: how(self.fs, self._path(name), data),
            *passes,
        )
        return self.uri(name)

    async def _call(
        self,
        what: str,
        action: Callable[[], T],
        *passes: type[FileExistsError | FileNotFoundError],
    ) -> T:
        """Do it in a thread, and again while the store is only too busy or out of reach.

        Raises:
            StorageError: Instead of every error that does not pass.
        """
        loop = asyncio.get_running_loop()
        began, attempt = loop.time(), 0
        while True:
            attempt += 1
            try:
                return await loop.run_in_executor(_THREADS, action)
            except passes:
                raise
            except Exception as error:  # noqa: BLE001 - each filesystem has errors of its own
                again = is_transient(error, attempt, loop.time() - began)
                problem = describe_error(error, self.options)
            if not again:
                raise StorageError(f"{what}: {problem}")
            await asyncio.sleep(jittered_backoff(attempt))

    def _path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"
