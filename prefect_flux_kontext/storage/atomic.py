"""Write files atomically on any fsspec filesystem: no reader sees a partial file.

On local disks, killed runs leave temporary files behind, which `remove_temporary_files` removes.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import secrets
import shutil
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from prefect_flux_kontext.storage.errors import is_precondition_failure

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prefect_flux_kontext.storage.filesystem import OutputFolder

# No write lasts a day, so nobody writes to a temporary file of this age.
_MIN_AGE_SECONDS = 86_400.0
_TEMPORARY_NAME = re.compile(r"\..+\.[0-9a-f]{12}\.part")

# The memory filesystem checks and writes in two steps, so its writers take turns.
_MEMORY_LOCK = threading.Lock()


def create_file(fs: Any, path: str, data: bytes) -> None:
    """Create a file, or raise FileExistsError if it exists.

    A disk without hard links raises NotImplementedError. Each filesystem has errors of its own.
    """
    if isinstance(fs, LocalFileSystem):
        folder_path, name = os.path.split(path)
        with _open_synced_folder(folder_path) as folder:
            if not _create_unnamed(folder, name, data):
                with _temporary_file(path, data) as temporary:
                    _link(temporary, path)
    elif isinstance(fs, MemoryFileSystem):
        with _MEMORY_LOCK:
            fs.pipe_file(path, data, mode="create")
    else:
        try:
            fs.pipe_file(path, data, mode="create")
        except Exception as error:
            # Some stores do not say which condition failed, so s3fs does not know what it means.
            if is_precondition_failure(error):
                raise FileExistsError(path) from error
            raise


def replace_file(fs: Any, path: str, data: bytes, *, is_private: bool = False) -> None:
    """Write a file, replace an older one, and hide a private one from other local users."""
    if isinstance(fs, LocalFileSystem):
        _replace_local(path, data, is_private=is_private)
    else:
        # One PUT: object stores show the whole object or nothing.
        fs.pipe_file(path, data)


def copy_into_place(fs: Any, path: str, source: Path) -> None:
    """Copy a local file, and replace an older one of that name. The data is streamed."""
    if isinstance(fs, LocalFileSystem):
        _replace_local(path, source)
    else:
        # Object stores show an object once its upload is complete.
        fs.put_file(str(source), path)


def _replace_local(path: str, data: bytes | Path, *, is_private: bool = False) -> None:
    with _open_synced_folder(os.path.dirname(path)), _temporary_file(path, data) as temporary:
        if is_private:
            os.chmod(temporary, 0o600)
        os.replace(temporary, path)


@contextlib.contextmanager
def _open_synced_folder(path: str) -> Iterator[int]:
    """Open a folder, created if missing, and sync its entries to disk after the block."""
    try:
        folder = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        os.makedirs(path, exist_ok=True)
        folder = os.open(path, os.O_RDONLY)
    try:
        yield folder
        os.fsync(folder)
    finally:
        os.close(folder)


def _create_unnamed(folder: int, name: str, data: bytes) -> bool:
    """Create a file that gets its name once it is complete, so that a kill leaves nothing behind.

    Returns False if the filesystem does not support it: Linux's own do, most others do not.
    """
    try:
        unnamed = os.open(".", os.O_WRONLY | os.O_TMPFILE, 0o666, dir_fd=folder)
    except (AttributeError, OSError):
        return False
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(unnamed, rest) :]
        os.fsync(unnamed)
        return _link_unnamed(unnamed, folder, name)
    finally:
        os.close(unnamed)


def _link_unnamed(unnamed: int, folder: int, name: str) -> bool:
    """Give an unnamed file its name; returns False where the system cannot."""
    try:
        os.link(f"/proc/self/fd/{unnamed}", name, src_dir_fd=folder, dst_dir_fd=folder)
    except FileExistsError:
        raise
    except OSError:  # /proc is missing, or the filesystem allows no such link
        return False
    return True


def _link(temporary: str, path: str) -> None:
    """Give a whole file its name, unless that is taken."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in {errno.EPERM, errno.ENOTSUP, errno.ENOSYS}:
            raise
        # Creating the file under its name would show it before it is whole.
        raise NotImplementedError(
            "the disk has no hard links, as SMB and some FUSE mounts; use another disk or a bucket"
        ) from error


@contextlib.contextmanager
def _temporary_file(path: str, data: bytes | Path) -> Iterator[str]:
    """Write the data to a temporary file beside its final path, and remove that after the block.

    Paths are strings: Python interns each component of a `Path`, and after some 100,000 of them it
    rebuilds its table of interned strings, which takes 4 MB in the current thread.
    """
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{secrets.token_hex(6)}.part")
    try:
        with open(temporary, "xb") as file:
            if isinstance(data, Path):
                with data.open("rb") as source:
                    shutil.copyfileobj(source, file)
            else:
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


async def remove_temporary_files(folder: OutputFolder, *, recursive: bool = False) -> int:
    """Remove temporary files that are older than a day, and return their number.

    Object stores have no temporary files. Files that cannot be removed stay.
    """
    if not isinstance(folder.fs, LocalFileSystem):
        return 0
    return await asyncio.to_thread(_remove_old, folder.root, recursive=recursive)


def _remove_old(root: str, *, recursive: bool) -> int:
    removed = 0
    # One entry at a time: an output may have a million files.
    with contextlib.suppress(OSError), os.scandir(root) as entries:
        for entry in entries:
            if _TEMPORARY_NAME.fullmatch(entry.name):
                with contextlib.suppress(OSError):
                    if time.time() - entry.stat().st_mtime > _MIN_AGE_SECONDS:
                        os.remove(entry.path)
                        removed += 1
            elif recursive and entry.is_dir(follow_symlinks=False):
                removed += _remove_old(entry.path, recursive=True)
    return removed
