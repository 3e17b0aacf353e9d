"""Many things, a few at a time."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
from typing import TYPE_CHECKING, TypeVar

from prefect_flux_kontext.errors import LedgerError
from prefect_flux_kontext.ledger.store import RecordStore

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from prefect_flux_kontext.storage.filesystem import OutputFolder

T = TypeVar("T")


def blocks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of so many items, the last of as many as are left."""
    rest = iter(items)
    return iter(lambda: list(itertools.islice(rest, size)), [])


ALBUM_FOLDER = "_gallery"
_PER_FILE = 48
"""Pictures of a file: about 0.7 MB, a screen or two of them."""

_INDEX = "index.json"
_AT_ONCE = 8


class ThumbnailStore:
    """The pictures beside a gallery.

    Args:
        output: The batch's output.

    Attributes:
        places: The file that each picture is in, once `read` was called.
    """

    def __init__(self, output: OutputFolder) -> None:
        self.places: dict[str, str] = {}
        self._store = RecordStore(output.below(ALBUM_FOLDER))
        self._written: dict[str, list[str]] = {}

    async def add(self, name: str, pictures: Mapping[str, bytes]) -> None:
        """Write pictures to files of that name and a number.

        Raises:
            LedgerError: The output cannot be written to.
        """
        for number, block in enumerate(blocks(pictures.items(), _PER_FILE), start=1):
            file = f"{name}-{number}"
            script = await asyncio.to_thread(_script, file, dict(block))
            await self._store.replace(f"{file}.js", script)
            self._written[file] = [picture for picture, _ in block]

    async def read(self) -> None:
        """Learn which pictures there are, also from runs that died before they could say so.

        Raises:
            LedgerError: The output cannot be read or written.
        """
        index: dict[str, list[str]] = json.loads(await self._store.read(_INDEX) or b"{}")
        before = len(index)
        index.update(self._written)
        names = [name[:-3] for name in await self._store.names("") if name.endswith(".js")]
        for name in names:
            if name not in index:
                index[name] = list(await self._pictures_of(name))
        if len(index) > before:
            await self._store.replace(_INDEX, json.dumps(index).encode())
        self.places = {picture: name for name in names for picture in index[name]}

    async def pictures(self, names: Iterable[str]) -> dict[str, str]:
        """Some of the pictures, as data URLs."""
        wanted = {name for name in names if name in self.places}
        files = sorted({self.places[name] for name in wanted})
        found: dict[str, str] = {}
        for block in blocks(files, _AT_ONCE):
            for pictures in await asyncio.gather(*map(self._pictures_of, block)):
                found |= {name: url for name, url in pictures.items() if name in wanted}
        return found

    async def _pictures_of(self, name: str) -> dict[str, str]:
        script = await self._store.read(f"{name}.js") or b""
        try:
            text = script.decode().partition(", ")[2].rpartition(")")[0]
            pictures: dict[str, str] = json.loads(text)
        except ValueError:
            raise LedgerError(f"The gallery's {self._store}/{name}.js is damaged.") from None
        return pictures


def _script(name: str, pictures: Mapping[str, bytes]) -> bytes:
    urls = {
        picture: f"data:image/webp;base64,{base64.b64encode(data).decode()}"
        for picture, data in pictures.items()
    }
    return f"galleryPart({json.dumps(name)}, {json.dumps(urls)});\n".encode()
