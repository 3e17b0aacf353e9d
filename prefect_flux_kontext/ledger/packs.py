"""Packs: the records of many stored rows in one file, so that a large output has few files.

`packs/<first two digits of the keys>/<name>.jsonl` is created whole and never changed. Its first
line has the place of each row by its key, and each further line has the records of one row.
`packs/version.json` is replaced after packs were created and before the records in them are
removed. So a claim that creates a record in the place of a removed one sees another version than
before, and finds the pack.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from prefect_flux_kontext.errors import LedgerError
from prefect_flux_kontext.ledger.records import RECORD_VERSION, RecordVersion

if TYPE_CHECKING:
    from collections.abc import Mapping

    from prefect_flux_kontext.ledger.store import RecordStore

_VERSION_RECORD = "packs/version.json"

_FIRST_READ_BYTES = 256 * 1024
"""Enough for the places of 5,000 rows."""

_PREFIX_LENGTH = 2


class _Places(BaseModel):
    """The first line of a pack: offset and length of each row's line, in bytes after this line."""

    version: RecordVersion = RECORD_VERSION
    rows: dict[str, tuple[int, int]]


class Packs:
    """The packs of a ledger; the places of rows are kept once they are read.

    Args:
        store: The ledger's records.
    """

    def __init__(self, store: RecordStore) -> None:
        self._store = store
        self._version: bytes | None = None
        self._is_version_known = False
        self._first_look = asyncio.Lock()
        self._names: dict[str, list[str]] = {}
        self._places: dict[str, str] = {}

    async def find(self, key: str, *, refresh: bool = False) -> dict[str, bytes] | None:
        """Return the records of a row, such as `1.intent`; None if it is in no pack.

        Args:
            key: The row key.
            refresh: Whether to look for packs that were created since the last look.

        Raises:
            LedgerError: A pack cannot be read or is damaged.
        """
        if refresh:
            await self._read_version()
        elif not self._is_version_known:
            async with self._first_look:  # of all rows that are read at the same time
                if not self._is_version_known:
                    await self._read_version()
        if self._version is None:
            return None
        for name in await self._list(key[:_PREFIX_LENGTH]):
            places = await self._read_places(name)
            at = places.find(f'"{key}":[')
            if at >= 0:
                begin = places.index("[", at)
                offset, length = json.loads(places[begin : places.index("]", at) + 1])
                offset += len(places) + 1
                line = await self._store.read(name, offset, offset + length)
                return _parse_row(f"{self._store}/{name}", key, line)
        return None

    async def list_keys(self, prefix: str) -> set[str]:
        """Return the keys of all packed rows that begin with a prefix of two digits.

        Raises:
            LedgerError: A pack cannot be read or is damaged.
        """
        self._names.pop(prefix, None)  # a pack without a new version is one all the same
        keys: set[str] = set()
        for name in await self._list(prefix):
            keys.update(json.loads(await self._read_places(name))["rows"])
        return keys

    async def _read_version(self) -> None:
        version = await self._store.read(_VERSION_RECORD)
        if not self._is_version_known or version != self._version:
            # A listing that is under way ends in the old dictionary.
            self._version, self._names = version, {}
            self._is_version_known = True

    async def _list(self, prefix: str) -> list[str]:
        names = self._names
        if prefix not in names:
            found = await self._store.list_names(f"packs/{prefix}")
            names[prefix] = [f"packs/{prefix}/{name}" for name in found if name.endswith(".jsonl")]
        return names[prefix]

    async def _read_places(self, name: str) -> str:
        if name not in self._places:
            size = _FIRST_READ_BYTES
            line, end, _ = (await self._store.read(name, 0, size) or b"").partition(b"\n")
            while not end and len(line) == size:
                size *= 4
                line, end, _ = (await self._store.read(name, 0, size) or b"").partition(b"\n")
            try:
                _Places.model_validate_json(line if end else b"")
            except ValidationError:
                raise _damaged(f"{self._store}/{name}") from None
            self._places[name] = line.decode()
        return self._places[name]


async def list_prefixes(store: RecordStore) -> list[str]:
    """Return the first two digits of the keys that packs hold.

    Raises:
        LedgerError: The ledger cannot be read.
    """
    return [name for name in await store.list_names("packs") if len(name) == _PREFIX_LENGTH]


async def create_pack(
    store: RecordStore, prefix: str, rows: Mapping[str, Mapping[str, bytes]]
) -> None:
    """Create a pack, and read it back.

    Args:
        store: The ledger's records.
        prefix: The first two digits of the rows' keys.
        rows: The records of each row.

    Raises:
        LedgerError: The pack cannot be written, or reads otherwise than it was written.
    """
    places, lines, offset = {}, [], 0
    for key, records in rows.items():
        parsed = {name: json.loads(data) for name, data in records.items()}
        line = _encode({"version": RECORD_VERSION, "key": key, "records": parsed}).encode()
        places[key] = (offset, len(line))
        lines.append(line)
        offset += len(line) + 1
    header = _encode({"version": RECORD_VERSION, "rows": places}).encode()
    data = b"\n".join([header, *lines, b""])
    name = f"packs/{prefix}/{secrets.token_hex(8)}.jsonl"
    if not await store.create(name, data) or await store.read(name) != data:
        raise _damaged(f"{store}/{name}")


async def announce_packs(store: RecordStore) -> None:
    """Make every claim look for new packs; call this before packed records are removed.

    Raises:
        LedgerError: The ledger cannot be written to.
    """
    version = {"version": RECORD_VERSION, "id": secrets.token_hex(8)}
    await store.replace(_VERSION_RECORD, _encode(version).encode())


def _parse_row(name: str, key: str, line: bytes | None) -> dict[str, bytes]:
    try:
        row = json.loads(line or b"")
        if row["key"] != key:
            raise KeyError(key)
        return {step: _encode(record).encode() for step, record in row["records"].items()}
    except (ValueError, LookupError, TypeError, AttributeError):
        raise _damaged(name) from None


def _encode(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _damaged(name: str) -> LedgerError:
    return LedgerError(
        f"The pack {name} is damaged, so its rows are not paid for. Restore it from a backup."
    )
