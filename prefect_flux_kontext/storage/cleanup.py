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
    for folder, subfolders, names in os.walk(root):
        if not recursive:
            subfolders.clear()
        for path in (Path(folder, name) for name in names if _TEMPORARY_NAME.fullmatch(name)):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _MIN_AGE_SECONDS:
                    path.unlink()
                    removed += 1
    return removed
