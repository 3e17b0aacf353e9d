"""What a batch and its partitions exchange through the output: progress, and rows of no file.

A progress record holds the counts of a partition. It is a view; the ledger is the truth. Rows that
are in no file are written to one, because Prefect shows the parameters of a flow run to everyone
and refuses more than 512 kB of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from prefect_flux_kontext.batch.summary import BatchSummary
from prefect_flux_kontext.errors import LedgerError, ManifestError, StorageError
from prefect_flux_kontext.ledger.records import RECORD_VERSION
from prefect_flux_kontext.manifest.tables import normalize_source, read_in_memory_rows
from prefect_flux_kontext.references.identity import url_identity

if TYPE_CHECKING:
    from prefect_flux_kontext.ledger.store import RecordStore
    from prefect_flux_kontext.manifest.reader import Manifest
    from prefect_flux_kontext.storage.filesystem import OutputFolder

logger = logging.getLogger(__name__)

WRITE_INTERVAL_SECONDS = 5.0
"""As often as the batch reads the record."""


@asynccontextmanager
async def report_progress(
    store: RecordStore, name: str, batch: BatchSummary
) -> AsyncIterator[None]:
    """Keep the progress record of a partition up to date while the block runs."""
    writing = asyncio.create_task(_write_periodically(store, name, batch))
    try:
        yield
    finally:
        writing.cancel()
        await asyncio.wait({writing})


async def _write_periodically(store: RecordStore, name: str, batch: BatchSummary) -> None:
    async def write() -> None:
        counts = batch.model_dump(mode="json", exclude={"failures", "output"})
        record = {"version": RECORD_VERSION, **counts}
        try:
            await store.replace(_get_record_name(name), json.dumps(record).encode())
        except LedgerError as error:
            logger.debug("The progress of this partition was not written: %s", error)

    try:
        while True:
            await asyncio.sleep(WRITE_INTERVAL_SECONDS)
            await write()
    finally:
        await write()


async def read_progress(store: RecordStore, name: str) -> BatchSummary:
    """Return the counts of a partition's rows so far; zeros if it has no valid record."""
    try:
        return BatchSummary.model_validate_json(await store.read(_get_record_name(name)) or b"{}")
    except (LedgerError, ValidationError):
        return BatchSummary()


async def remove_progress(store: RecordStore, name: str) -> None:
    """Remove the progress record of a partition."""
    with contextlib.suppress(LedgerError):
        await store.remove(_get_record_name(name))


def _get_record_name(name: str) -> str:
    return f"partitions/{name}.json"


@asynccontextmanager
async def share_rows(manifest: Manifest, output: OutputFolder) -> AsyncIterator[dict[str, Any]]:
    """Write the rows, or a URL that grants access, to a file of the output during the block.

    Yields:
        The parameters by which a partition finds them; none for a manifest that it can open
        itself.

    Raises:
        StorageError: The file cannot be written.
    """
    source = normalize_source(manifest.source)
    if isinstance(source, str) and url_identity(source) == source:
        yield {}
        return
    shared = source
    parameters: dict[str, Any] = {"manifest": f"<rows in {output}>"}
    if not isinstance(source, str):
        shared = await asyncio.to_thread(_list_cells, source, manifest.columns)
        parameters["columns"] = {}  # the cells have the standard names
    data = json.dumps(shared).encode()
    # Others may be able to write to the output, so the name holds what the content must be.
    name = f"{secrets.token_hex(8)}-{hashlib.sha256(data).hexdigest()}"
    await output.write(_get_path(name), data, is_private=True)
    try:
        yield {**parameters, "rows_file": name}
    finally:
        with contextlib.suppress(StorageError):
            await output.discard(_get_path(name))


async def read_shared_rows(output: OutputFolder, name: str) -> Any:
    """Read the source of a batch that `share_rows` has written.

    Raises:
        ManifestError: The file is missing or was changed.
        StorageError: The file cannot be read.
    """
    data = await output.read(_get_path(name)) or b""
    if hashlib.sha256(data).hexdigest() != name.rpartition("-")[2]:
        raise ManifestError(
            f"The rows of this partition are not in {output.uri(_get_path(name))} any more, or "
            "were changed. The batch, or a later run of it, finishes them."
        )
    return json.loads(data)


def _get_path(name: str) -> str:
    return f"_partitions/{name}.json"


def _list_cells(source: Any, columns: Mapping[str, str]) -> list[dict[str, str]]:
    """Return the cells of all rows; an invalid or blank row keeps its place, and stays invalid."""
    rows: list[dict[str, str]] = []
    for line in read_in_memory_rows(source, columns):
        rows += [{} for _ in range(line.number - 1 - len(rows))]
        rows.append({} if line.problem else line.cells)
    return rows
