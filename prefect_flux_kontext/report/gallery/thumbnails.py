"""The stored thumbnails of a gallery: script files beside the page, and their index."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import TYPE_CHECKING

from prefect_flux_kontext.errors import LedgerError
from prefect_flux_kontext.ledger.store import RecordStore

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from prefect_flux_kontext.storage.filesystem import OutputFolder

GALLERY_FOLDER = "_gallery"

# A file of this many thumbnails has about 0.7 MB and fills a screen or two.
_THUMBNAILS_PER_FILE = 48

_INDEX = "index.json"

_PARALLEL_READS = 8


class ThumbnailStore:
    """The thumbnails of a gallery, in script files that the page loads on demand.

    The files are scripts because a page opened from the disk may not read other files.
    """

    def __init__(self, output: OutputFolder) -> None:
        self.files: dict[str, str] = {}  # by thumbnail, the file that holds it; see `load_index`
        self._store = RecordStore(output.below(GALLERY_FOLDER))
        self._written: dict[str, list[str]] = {}

    async def add(self, name: str, thumbnails: Mapping[str, bytes]) -> None:
        """Write thumbnails to files that are called by the given name and a number.

        Raises:
            LedgerError: The output cannot be written to.
        """
        items = list(thumbnails.items())
        for start in range(0, len(items), _THUMBNAILS_PER_FILE):
            block = dict(items[start : start + _THUMBNAILS_PER_FILE])
            file = f"{name}-{start // _THUMBNAILS_PER_FILE + 1}"
            script = await asyncio.to_thread(_render_script, file, block)
            await self._store.replace(f"{file}.js", script)
            self._written[file] = list(block)

    async def load_index(self, *, save: bool = True) -> bool:
        """Load the index of all thumbnails and complete it; return whether there are new files.

        A run that was killed may have written files that the index does not name. Without `save`,
        only what is new is read, and the completed index is not written.

        Raises:
            LedgerError: The output cannot be read or written.
        """
        files = [name[:-3] for name in await self._store.list_names("") if name.endswith(".js")]
        if not save and self._written.keys() >= set(files):
            return False
        index: dict[str, list[str]] = json.loads(await self._store.read(_INDEX) or b"{}")
        before = len(index)
        index.update(self._written)
        for file in files:
            if file not in index:
                index[file] = list(await self._read_file(file))
        if not save:
            self._written = index
        elif len(index) > before:
            await self._store.replace(_INDEX, json.dumps(index).encode())
        self.files = {thumbnail: file for file in files for thumbnail in index[file]}
        return True

    async def load(self, names: Iterable[str]) -> dict[str, str]:
        """Return the named thumbnails as data URLs; names that do not exist are left out.

        Raises:
            LedgerError: The output cannot be read.
        """
        wanted = {name for name in names if name in self.files}
        files = sorted({self.files[name] for name in wanted})
        found: dict[str, str] = {}
        for start in range(0, len(files), _PARALLEL_READS):
            block = files[start : start + _PARALLEL_READS]
            for thumbnails in await asyncio.gather(*map(self._read_file, block)):
                found |= {name: url for name, url in thumbnails.items() if name in wanted}
        return found

    async def _read_file(self, name: str) -> dict[str, str]:
        script = await self._store.read(f"{name}.js") or b""
        try:
            text = script.decode().partition(", ")[2].rpartition(")")[0]
            thumbnails: dict[str, str] = json.loads(text)
        except ValueError:
            raise LedgerError(
                f"The gallery file {self._store}/{name}.js is damaged. Remove it and run "
                "`flux-kontext gallery` again."
            ) from None
        return thumbnails


def _render_script(name: str, thumbnails: Mapping[str, bytes]) -> bytes:
    urls = {
        thumbnail: f"data:image/webp;base64,{base64.b64encode(data).decode()}"
        for thumbnail, data in thumbnails.items()
    }
    return f"galleryPart({json.dumps(name)}, {json.dumps(urls)});\n".encode()
