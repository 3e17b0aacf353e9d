"""Files that are whole from the moment they can be seen, on any fsspec filesystem."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import threading
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

_MEMORY = threading.Lock()


def create_file(fs: Any, path: str, data: bytes) -> None:
    """Put a file where there is none.

    Raises:
        FileExistsError: There is one.
        Exception: Each filesystem has errors of its own.
    """
    if isinstance(fs, LocalFileSystem):
        _place(path, data, exclusively=True)
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
        _place(path, data, exclusively=False)
    else:
        # One PUT: an object store shows the object whole or not at all.
        fs.pipe_file(path, data)


def copy_into_place(fs: Any, path: str, source: Path) -> None:
    """Put a file of this machine in place, over an older one of that name; never held whole.

    Raises:
        Exception: Each filesystem has errors of its own.
    """
    if isinstance(fs, LocalFileSystem):
        _place(path, source, exclusively=False)
    else:
        # An object store shows the object once its last piece has come.
        fs.put_file(str(source), path)


def _place(path: str, data: bytes | Path, *, exclusively: bool) -> None:
    """Write beside the place and then put it there.

    Paths are text: each part of a `Path` is interned, and Python makes its table of what is
    interned anew after some 100,000 of them, 4 MB in the memory of whatever thread it is.
    """
    where, name = os.path.split(path)
    os.makedirs(where, exist_ok=True)
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
        if exclusively:
            os.link(part, path)
        else:
            os.replace(part, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(part)
    folder = os.open(where, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
