"""Rebuilding a ledger's wave files from the records of its rows, which hold everything."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

from prefect_flux_kontext.batch.budget import ensure_sole_run
from prefect_flux_kontext.ledger.head import check_format
from prefect_flux_kontext.ledger.heartbeat import keep_heartbeat
from prefect_flux_kontext.ledger.ledger import Ledger
from prefect_flux_kontext.ledger.packs import Packs, list_prefixes
from prefect_flux_kontext.ledger.waves import OpenWave, close_wave, delete_wave, open_wave

if TYPE_CHECKING:
    from prefect_flux_kontext.ledger.store import RecordStore

_ROWS_PER_WAVE = 1_000
_OPEN_SUFFIX = ".open.json"


class Repair(NamedTuple):
    """What a repair found and did."""

    rows: int  # with records
    finished: int  # stored or failed
    unfinished: int  # the others, which open waves name now
    removed: int  # wave files that were replaced


async def rebuild_waves(store: RecordStore) -> Repair:
    """Write wave files from the records of all rows, and remove the old ones.

    A wave file is removed only after all rows are in new ones, so a repair that is interrupted
    loses nothing and can be run again.

    Raises:
        ConfigurationError: A run is using the output.
        LedgerError: The ledger cannot be read or written, or the record of a row is damaged.
    """
    await check_format(store)
    async with keep_heartbeat(store) as heartbeat:
        owner = heartbeat.owner
        await ensure_sole_run(store, owner, "its ledger cannot be rebuilt")
        ledger = Ledger(store, owner, prices={})
        old = await store.list_names("waves")
        rows = finished = 0
        keys = await _list_keys(store)
        for start in range(0, len(keys), _ROWS_PER_WAVE):
            block = keys[start : start + _ROWS_PER_WAVE]
            entries = await asyncio.gather(*(ledger.read(key) for key in block))
            wave = OpenWave(name=f"{owner}-{start:09}", owner=owner, keys=block)
            await open_wave(store, wave)
            await close_wave(store, wave, entries)
            rows += len(entries)
            finished += sum(entry.ended is not None for entry in entries)
        await asyncio.gather(*(_remove(store, name) for name in old))
    return Repair(rows, finished, rows - finished, len(old))


async def _remove(store: RecordStore, name: str) -> None:
    """Remove a wave file, or leave it without rows where the store refuses to remove it."""
    if name.endswith(_OPEN_SUFFIX):
        wave = OpenWave(name=name.removesuffix(_OPEN_SUFFIX), owner="", keys=[])
        await delete_wave(store, wave)
    else:
        await store.discard(f"waves/{name}")


async def _list_keys(store: RecordStore) -> list[str]:
    folders = await store.list_names("rows")
    names = await asyncio.gather(*(store.list_names(f"rows/{folder}") for folder in folders))
    packs = Packs(store)
    packed = await asyncio.gather(*map(packs.list_keys, await list_prefixes(store)))
    return sorted({name.partition(".")[0] for folder in names for name in folder}.union(*packed))
