"""Write files atomically on any fsspec filesystem: no reader sees a partial file."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from prefect_flux_kontext.storage.errors import is_precondition_failure

if TYPE_CHECKING:
    from collections.abc import Iterator

# The memory filesystem checks and writes in two steps, so its writers take turns.
_MEMORY_LOCK = threading.Lock()


def create_file(fs: Any, path: str, data: bytes) -> None:
    """Create a file that does not exist yet.

    Raises:
        FileExistsError: The file exists.
        NotImplementedError: The disk has no hard links.
        Exception: The file cannot be written. Each filesystem has its own errors.
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
    """Write a file, and replace an older one of that name.

    Args:
        fs: The filesystem.
        path: The path of the file.
        data: The content of the file.
        is_private: Whether only this user may read it, on a local disk.

    Raises:
        Exception: The file cannot be written. Each filesystem has its own errors.
    """
    if isinstance(fs, LocalFileSystem):
        _replace_local(path, data, is_private=is_private)
    else:
        # One PUT: object stores show the whole object or nothing.
        fs.pipe_file(path, data)


def copy_into_place(fs: Any, path: str, source: Path) -> None:
    """Copy a local file, and replace an older one of that name. The data is streamed.

    Raises:
        Exception: The file cannot be written. Each filesystem has its own errors.
    """
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

    Returns:
        Whether the system and the filesystem support it. Linux's own filesystems do, most others
        do not.

    Raises:
        FileExistsError: A file of that name exists.
        OSError: The file cannot be written.
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
