"""Files that are whole from the moment they can be seen, on any fsspec filesystem."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

if TYPE_CHECKING:
    from collections.abc import Iterator

_MEMORY = threading.Lock()


def create_file(fs: Any, path: str, data: bytes) -> None:
    """Put a file where there is none.

    Raises:
        FileExistsError: There is one.
        Exception: Each filesystem has errors of its own.
    """
    if isinstance(fs, LocalFileSystem):
        where, name = os.path.split(path)
        with _synced(where) as folder:
            if not _linked(folder, name, data):
                with _part(path, data) as part:
                    os.link(part, path)
    elif isinstance(fs, MemoryFileSystem):
        with _MEMORY:
            fs.pipe_file(path, data, mode="create")
    else:
        fs.pipe_file(path, data, mode="create")


def replace_file(fs: Any, path: str, data: bytes) -> None:
    """Put a file in place, over an older one of that name.

    Raises:
        Exception: Each filesystem has errors of its own.
    """
    if isinstance(fs, LocalFileSystem):
        _put_over(path, data)
    else:
        # One PUT: an object store shows the object whole or not at all.
        fs.pipe_file(path, data)


def copy_into_place(fs: Any, path: str, source: Path) -> None:
    """Put a file of this machine in place, over an older one of that name; never held whole.

    Raises:
        Exception: Each filesystem has errors of its own.
    """
    if isinstance(fs, LocalFileSystem):
        _put_over(path, source)
    else:
        # An object store shows the object once its last piece has come.
        fs.put_file(str(source), path)


def _put_over(path: str, data: bytes | Path) -> None:
    with _synced(os.path.dirname(path)), _part(path, data) as part:
        os.replace(part, path)


@contextlib.contextmanager
def _synced(where: str) -> Iterator[int]:
    """A folder, made where there is none; what is put there is on the disk at the end."""
    try:
        folder = os.open(where, os.O_RDONLY)
    except FileNotFoundError:
        os.makedirs(where, exist_ok=True)
        folder = os.open(where, os.O_RDONLY)
    try:
        yield folder
        os.fsync(folder)
    finally:
        os.close(folder)


def _linked(folder: int, name: str, data: bytes) -> bool:
    """Create a file that has no name until it is whole, so that a kill leaves nothing behind.

    Returns:
        Whether the system and the filesystem know how: Linux's own do, most of the others do not.

    Raises:
        FileExistsError: There is one of that name.
        OSError: It could not be written.
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
        return _named(unnamed, folder, name)
    finally:
        os.close(unnamed)


def _named(unnamed: int, folder: int, name: str) -> bool:
    try:
        os.link(f"/proc/self/fd/{unnamed}", name, src_dir_fd=folder, dst_dir_fd=folder)
    except FileExistsError:
        raise
    except OSError:  # there is no /proc, or no link may lead there
        return False
    return True


@contextlib.contextmanager
def _part(path: str, data: bytes | Path) -> Iterator[str]:
    """The data in a file beside its place, which is gone at the end.

    Paths are text: each part of a `Path` is interned, and Python makes its table of what is
    interned anew after some 100,000 of them, 4 MB in the memory of whatever thread it is.
    """
    where, name = os.path.split(path)
    part = os.path.join(where, f".{name}.{secrets.token_hex(6)}.part")
    try:
        with open(part, "xb") as file:
            if isinstance(data, Path):
                with data.open("rb") as source:
                    shutil.copyfileobj(source, file)
            else:
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield part
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(part)
