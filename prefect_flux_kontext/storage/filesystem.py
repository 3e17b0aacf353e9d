"""An output folder on any fsspec filesystem. Files are written atomically."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar

import fsspec
import fsspec.config
from fsspec.implementations.local import LocalFileSystem

from prefect_flux_kontext.client.retry import jittered_backoff
from prefect_flux_kontext.errors import ConfigurationError, StorageError
from prefect_flux_kontext.redaction import has_password
from prefect_flux_kontext.storage.atomic import copy_into_place, create_file, replace_file
from prefect_flux_kontext.storage.errors import describe_error, is_transient
from prefect_flux_kontext.telemetry import trace

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
    from pathlib import Path

T = TypeVar("T")
Data = TypeVar("Data", bytes, "Path")

# Separate from the ledger's threads and from asyncio's own, of which a small machine has five: a
# store that is slow to take images delays neither ledger records nor image checks.
_THREADS = ThreadPoolExecutor(16, thread_name_prefix="flux-kontext-images")
_PROBE = ".probe"

# With botocore's default of 10, images would take connections from the ledger, whose writes delay
# submits.
_S3_CONNECTIONS = 48


def _build_s3_defaults(url: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return default options for S3; the given options and fsspec's settings override them.

    They allow as many connections as there are threads, and read a small file in one request
    instead of two.
    """
    if not url.startswith(("s3://", "s3a://")):
        return {}
    given = {**fsspec.config.conf.get("s3", {}), **options}
    connections = {"max_pool_connections": _S3_CONNECTIONS, **given.get("config_kwargs", {})}
    return {"max_concurrency": given.get("max_concurrency", 1), "config_kwargs": connections}


class OutputFolder:
    """A folder or prefix to write to, given as an fsspec URL or a local path.

    The options are those of the fsspec filesystem: for S3 `endpoint_url`, `key`, `secret`,
    `profile`, …. They may be secret, and appear in no message. All methods raise a StorageError if
    the filesystem does.

    Raises:
        ConfigurationError: The filesystem is unknown or not installed, the URL chains several
            filesystems, or the options are invalid.
    """

    # Without a `__dict__`, nothing serializes the options by accident, such as Prefect the
    # parameters of a flow.
    __slots__ = ("fs", "options", "root")

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
        if has_password(location):
            raise ConfigurationError(
                f"The output {location!r} has a user name or password in its URL. Set them in "
                "FLUX_KONTEXT_STORAGE_OPTIONS, in a Block or in storage_options."
            )
        self.options = dict(storage_options or {})
        # Other runs write here too, so listings must not be cached.
        options = {
            **self.options,
            **_build_s3_defaults(location, self.options),
            "use_listings_cache": False,
        }
        problem = None
        try:
            self.fs, root = fsspec.core.url_to_fs(location, **options)
        except Exception as error:  # noqa: BLE001 - each filesystem has its own errors
            problem = describe_error(error, self.options)
        if problem:
            raise ConfigurationError(f"The output {location!r} cannot be used: {problem}")
        self.root = str(root)

    def __str__(self) -> str:
        return str(self.fs.unstrip_protocol(self.root))

    @property
    def is_local(self) -> bool:
        """Whether the folder is on a disk of this machine."""
        return isinstance(self.fs, LocalFileSystem)

    def below(self, name: str) -> Self:
        """Return a subfolder, on the same filesystem."""
        folder = copy.copy(self)
        folder.root = self._path(name)
        return folder

    async def write(self, name: str, data: bytes, *, is_private: bool = False) -> str:
        """Write a file, replace an older one of that name, and return its URI.

        On a local disk, only this user may read a private one. No partial file is ever visible.
        """
        replace = partial(replace_file, is_private=is_private)
        return await self._write(replace, name, data)

    def uri(self, name: str) -> str:
        """Return the URI of a file in this folder."""
        return str(self.fs.unstrip_protocol(self._path(name)))

    def relative(self, uri: str) -> str:
        """Return the name of a file in this folder, given its URI."""
        return uri.removeprefix(f"{self}/")

    @trace("store")
    async def write_unique(self, names: Sequence[str], data: bytes) -> str:
        """Write a file under the first name that is free or has the same bytes; return its URI.

        The last name belongs to this file alone, so an older file of that name is replaced.
        """
        for name in names[:-1]:
            try:
                return await self._write(create_file, name, data, FileExistsError)
            except FileExistsError:
                if await self.read(name) == data:
                    return self.uri(name)
        return await self.write(names[-1], data)

    async def read(self, name: str) -> bytes | None:
        """Return the bytes of a file, or None if there is none."""
        try:
            return await self._call(
                f"{self.uri(name)} cannot be read",
                lambda: bytes(self.fs.cat_file(self._path(name))),
                FileNotFoundError,
            )
        except FileNotFoundError:
            return None

    def find_missing(
        self, names: Iterable[str], listed: Collection[str] | None = None
    ) -> list[str]:
        """Return those of the files that do not exist; blocking.

        Files outside of the folder are not looked for.

        Args:
            names: The files.
            listed: All files that exist; without it, only a local disk is looked at.
        """
        if listed is None and not self.is_local:
            return []
        root = self.root.rstrip("/")

        def exists(name: str) -> bool:
            return name in listed if listed is not None else os.path.lexists(f"{root}/{name}")

        return [
            name
            for name in names
            if "://" not in name and not _leads_out(name) and not exists(name)
        ]

    async def list_all(self, *, leave_out: str) -> set[str]:
        """Return the names of all files in this folder and below.

        Args:
            leave_out: A subfolder that is not listed.

        Raises:
            StorageError: The filesystem reported an error.
        """
        root = self.root.rstrip("/")

        def walk() -> set[str]:
            found: set[str] = set()
            for folder, folders, files in self.fs.walk(root, on_error="raise"):
                below = str(folder).rstrip("/")[len(root) + 1 :]
                if not below and leave_out in folders:
                    folders.remove(leave_out)
                found.update(f"{below}/{file}" if below else file for file in files)
            return found

        return await self._call(f"{self} cannot be listed", walk)

    async def put(self, name: str, source: Path) -> str:
        """Copy a local file here, replace an older one of that name, and return its URI."""
        return await self._write(copy_into_place, name, source)

    async def fetch(self, name: str, target: Path) -> bool:
        """Copy a file to a local path; returns False if there is none."""
        try:
            await self._call(
                f"{self.uri(name)} cannot be read",
                lambda: self.fs.get_file(self._path(name), str(target)),
                FileNotFoundError,
            )
        except FileNotFoundError:
            # Some filesystems have created an empty target by then.
            await asyncio.to_thread(target.unlink, missing_ok=True)
            return False
        return True

    async def exists(self, name: str) -> bool:
        """Whether a file exists."""
        return await self._call(
            f"{self.uri(name)} cannot be checked",
            lambda: bool(self.fs.exists(self._path(name))),
        )

    async def read_stamp(self, name: str) -> str | None:
        """Return text that changes when a file is replaced, or None if there is none.

        Raises:
            StorageError: The filesystem reported an error.
        """
        try:
            info = await self._call(
                f"{self.uri(name)} cannot be checked",
                lambda: self.fs.info(self._path(name)),
                FileNotFoundError,
            )
        except FileNotFoundError:
            return None
        return _stamp(info)

    async def list_stamps(self, name: str) -> dict[str, str]:
        """Return the names of the files in a subfolder, each with its stamp.

        Raises:
            StorageError: The filesystem reported an error.
        """
        try:
            infos = await self._call(
                f"{self.uri(name)} cannot be listed",
                lambda: self.fs.ls(self._path(name), detail=True),
                FileNotFoundError,
            )
        except FileNotFoundError:
            return {}
        return {
            str(info["name"]).rpartition("/")[2]: _stamp(info)
            for info in infos
            if info["type"] == "file"
        }

    async def remove(self, name: str) -> None:
        """Remove a file, if it exists."""
        with contextlib.suppress(FileNotFoundError):
            await self._call(
                f"{self.uri(name)} cannot be removed",
                lambda: self.fs.rm_file(self._path(name)),
                FileNotFoundError,
            )

    async def discard(self, name: str) -> None:
        """Remove a file, or empty it where files may not be removed."""
        try:
            await self.remove(name)
        except StorageError:
            if await self.exists(name):
                await self.write(name, b"")

    async def check_writable(self) -> None:
        """Check with an empty test file that the folder can be written to.

        A wrong output, or a disk on which no file can be created exclusively, is thus found before
        anything is paid. The file is removed again where possible. It always has the same name, so
        at most one is ever left.

        Raises:
            ConfigurationError: The folder cannot be written to.
        """
        try:
            try:
                await self._write(create_file, _PROBE, b"", FileExistsError)
            except FileExistsError:  # left over, or of another run
                await self.write(_PROBE, b"")
        except StorageError as error:
            raise ConfigurationError(f"{self} cannot be written to. {error}") from None
        with contextlib.suppress(StorageError):
            await self.remove(_PROBE)

    async def _write(
        self,
        write_file: Callable[[Any, str, Data], None],
        name: str,
        data: Data,
        *expected: type[FileExistsError],
    ) -> str:
        await self._call(
            f"The file {self.uri(name)} cannot be written",
            lambda: write_file(self.fs, self._path(name), data),
            *expected,
        )
        return self.uri(name)

    async def _call(
        self,
        failure: str,
        action: Callable[[], T],
        *expected: type[FileExistsError | FileNotFoundError],
    ) -> T:
        """Run an action in a thread, and repeat it after transient errors.

        Raises:
            StorageError: The action failed with any other error than the expected ones.
        """
        loop = asyncio.get_running_loop()
        began, attempt = loop.time(), 0
        while True:
            attempt += 1
            try:
                return await loop.run_in_executor(_THREADS, action)
            except expected:
                raise
            except Exception as error:  # noqa: BLE001 - each filesystem has its own errors
                can_retry = is_transient(error, attempt, loop.time() - began)
                problem = describe_error(error, self.options)
            if not can_retry:
                raise StorageError(f"{failure}: {problem}")
            await asyncio.sleep(jittered_backoff(attempt))

    def _path(self, name: str) -> str:
        # Names may come from files in the output, such as the ledger's.
        if _leads_out(name):
            raise StorageError(f"The name {name!r} leads out of {self}.")
        return f"{self.root.rstrip('/')}/{name}"


def _leads_out(name: str) -> bool:
    return ".." in name.split("/")


def _stamp(info: Mapping[str, Any]) -> str:
    names = ("ETag", "etag", "mtime", "created", "ino", "size")
    return repr([info.get(name) for name in names])
