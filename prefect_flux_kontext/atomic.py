"""Files on local disks that are whole from the moment they can be seen."""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def place(path: Path, data: bytes, *, exclusively: bool = False) -> None:
    """Write beside the place and then put it there.

    Args:
        path: The place; its folder is made.
        data: The whole file.
        exclusively: Refuse where there is a file already.

    Raises:
        FileExistsError: There is one, and it was to be exclusive.
        OSError: The filesystem refused.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
    try:
        with part.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if exclusively:
            path.hardlink_to(part)
        else:
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
