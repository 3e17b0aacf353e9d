"""Remove temporary files that killed runs have left on a local disk."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from fsspec.implementations.local import LocalFileSystem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prefect_flux_kontext.storage.filesystem import OutputFolder

# No write lasts a day, so nobody writes to a temporary file of this age.
_MIN_AGE_SECONDS = 86_400.0

# The names that `storage.atomic` gives to temporary files.
_TEMPORARY_NAME = re.compile(r"\..+\.[0-9a-f]{12}\.part")


async def remove_temporary_files(folder: OutputFolder, *, recursive: bool = False) -> int:
    """Remove temporary files that are older than a day, and return their number.

    Only files on local disks with a name of `storage.atomic` are removed: object stores have no
    temporary files. Files that cannot be removed stay.
    """
    if not isinstance(folder.fs, LocalFileSystem):
        return 0
    return await asyncio.to_thread(_remove_old, folder.root, recursive=recursive)


def _remove_old(root: str, *, recursive: bool) -> int:
    removed = 0
    for entry in _list_files(root, recursive=recursive):
        with contextlib.suppress(OSError):
            if (
                _TEMPORARY_NAME.fullmatch(entry.name)
                and time.time() - entry.stat().st_mtime > _MIN_AGE_SECONDS
            ):
                Path(entry.path).unlink()
                removed += 1
    return removed


def _list_files(root: str, *, recursive: bool) -> Iterator[os.DirEntry[str]]:
    with contextlib.suppress(OSError), os.scandir(root) as entries:
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                yield entry
            elif recursive:
                yield from _list_files(entry.path, recursive=True)
