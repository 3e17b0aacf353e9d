"""What killed runs leave half-written on a local disk, swept away a day later."""

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

_AGE = 86_400.0
_PART = re.compile(r"\..+\.[0-9a-f]{12}\.part")


async def sweep(folder: OutputFolder, *, recursive: bool = False) -> int:
    """Remove the parts of files that nobody writes any more, and return how many there were.

    Only names that `atomic` gives, older than a day, on local disks: an object store shows no
    object before it is whole. What cannot be removed stays.

    Args:
        folder: Where to look.
        recursive: Look into its folders too.
    """
    if not isinstance(folder.fs, LocalFileSystem):
        return 0
    return await asyncio.to_thread(_sweep, folder.root, recursive=recursive)


def _sweep(root: str, *, recursive: bool) -> int:
    swept = 0
    for entry in _files(root, recursive=recursive):
        with contextlib.suppress(OSError):
            if _PART.fullmatch(entry.name) and time.time() - entry.stat().st_mtime > _AGE:
                Path(entry.path).unlink()
                swept += 1
    return swept


def _files(root: str, *, recursive: bool) -> Iterator[os.DirEntry[str]]:
    with contextlib.suppress(OSError), os.scandir(root) as entries:
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                yield entry
            elif recursive:
                yield from _files(entry.path, recursive=True)
