"""Compaction of a ledger: the records of stored rows move from three files a row into packs."""

from __future__ import annotations

import asyncio
import secrets
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from prefect_flux_kontext.batch.budget import ensure_sole_run
from prefect_flux_kontext.errors import ConfigurationError, LedgerError
from prefect_flux_kontext.ledger.head import check_format
from prefect_flux_kontext.ledger.heartbeat import keep_heartbeat
from prefect_flux_kontext.ledger.ledger import Ledger
from prefect_flux_kontext.ledger.packs import Packs, announce_packs, create_pack
from prefect_flux_kontext.ledger.records import State
from prefect_flux_kontext.ledger.waves import read_open_waves

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from prefect_flux_kontext.ledger.store import RecordStore

_MIN_ROWS = 10
"""Rows for which a pack is worth a file; a ledger has up to 256 folders of rows."""


class Compaction(NamedTuple):
    """What a compaction has done so far."""

    steps: int = 1  # folders of rows
    steps_done: int = 0
    rows: int = 0  # packed
    packs: int = 0  # created
    removed: int = 0  # files
    left: int = 0  # rows that keep files of their own


async def compact_ledger(store: RecordStore) -> AsyncGenerator[Compaction, None]:
    """Pack the records of stored rows, and remove their files; yield what is done after each step.

    A compaction that is interrupted loses nothing, and the next one completes it. Rows that an
    open wave names are left out, because each look at the ledger reads these one by one.

    Raises:
        ConfigurationError: A run is using the output, or files may not be removed. Nothing was
            changed.
        LedgerError: The ledger cannot be read or written, or a record is damaged.
    """
    await check_format(store)
    async with keep_heartbeat(store) as heartbeat:
        await ensure_sole_run(store, heartbeat.owner, "its ledger cannot be compacted")
        await _require_removal(store)
        prefixes = await store.list_names("rows")
        done = Compaction(steps=len(prefixes) or 1)
        named = {key async for wave in read_open_waves(store) for key in wave.keys}
        ledger, packs = Ledger(store, heartbeat.owner, prices={}), Packs(store)
        for prefix in prefixes:
            packed = await packs.list_keys(prefix)
            names = await _list_by_key(store, prefix)
            candidates = sorted(names.keys() - named - packed)
            rows = await _read_stored_rows(ledger, prefix, {key: names[key] for key in candidates})
            if len(rows) >= _MIN_ROWS:
                await create_pack(store, prefix, rows)
                packed |= rows.keys()
                done = done._replace(rows=done.rows + len(rows), packs=done.packs + 1)
            # Nothing is removed but what is in packs that were listed before they are announced:
            # another compaction may have created one that it has not announced yet.
            files = [name for key in names.keys() & packed for name in names[key]]
            if files:
                await announce_packs(store)
            await asyncio.gather(*(store.remove(f"rows/{prefix}/{name}") for name in files))
            done = done._replace(
                steps_done=done.steps_done + 1,
                removed=done.removed + len(files),
                left=done.left + len(names.keys() - packed),
            )
            yield done


async def _require_removal(store: RecordStore) -> None:
    probe = f"probe/{secrets.token_hex(8)}.json"
    await store.create(probe, b"1")
    try:
        await store.remove(probe)
    except LedgerError as error:
        raise ConfigurationError(
            f"The ledger cannot be compacted without the permission to remove files (on S3: "
            f"s3:DeleteObject), so nothing was changed. {error.message}"
        ) from None


async def _list_by_key(store: RecordStore, prefix: str) -> dict[str, list[str]]:
    names = defaultdict(list)
    for name in await store.list_names(f"rows/{prefix}"):
        names[name.partition(".")[0]].append(name)
    return names


async def _read_stored_rows(
    ledger: Ledger, prefix: str, names: Mapping[str, list[str]]
) -> dict[str, dict[str, bytes]]:
    """Return the records of those rows that are stored, by row key and step.

    Args:
        ledger: The ledger.
        prefix: The folder of the rows.
        names: The files of each row.
    """

    async def read(key: str) -> dict[str, bytes]:
        records = await asyncio.gather(
            *(ledger.store.read(f"rows/{prefix}/{name}") for name in names[key])
        )
        steps = (name.removeprefix(f"{key}.").removesuffix(".json") for name in names[key])
        return {step: data for step, data in zip(steps, records, strict=True) if data is not None}

    rows = dict(zip(names, await asyncio.gather(*map(read, names)), strict=True))
    states = [(await ledger.parse(key, records)).state for key, records in rows.items()]
    return {
        key: records
        for (key, records), state in zip(rows.items(), states, strict=True)
        if state is State.STORED
    }
