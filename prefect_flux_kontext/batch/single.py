"""Single requests that are paid for once, however often a flow is retried, killed or run again.

A single request has the same records as a row of a batch, and an open wave of its own that names
it, so `status`, `collect` and `resolve` find it.
"""

from __future__ import annotations

import asyncio
import hashlib
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from prefect_flux_kontext.batch.outage import PostGate
from prefect_flux_kontext.batch.reference_checks import with_row_keys
from prefect_flux_kontext.batch.stopping import StopGate
from prefect_flux_kontext.batch.submission import Submitter
from prefect_flux_kontext.callbacks.requests import RequestCallbacks
from prefect_flux_kontext.errors import (
    ConfigurationError,
    FluxKontextError,
    ReferenceImageError,
    ReplyLostError,
    ServiceTroubleError,
    UnreadableReplyError,
)
from prefect_flux_kontext.ledger.head import bind
from prefect_flux_kontext.ledger.heartbeat import find_budget_run
from prefect_flux_kontext.ledger.ledger import Ledger, RowAlreadyClaimedError
from prefect_flux_kontext.ledger.process import register_process
from prefect_flux_kontext.ledger.records import State
from prefect_flux_kontext.ledger.store import open_ledger_store
from prefect_flux_kontext.ledger.waves import OpenWave, open_wave
from prefect_flux_kontext.manifest.row import Row
from prefect_flux_kontext.manifest.row_key import compute_row_key
from prefect_flux_kontext.references.ratio import open_ratio_matcher
from prefect_flux_kontext.storage.names import make_safe_name

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from prefect_flux_kontext.callbacks.options import CallbackOptions
    from prefect_flux_kontext.client.client import FluxKontextClient
    from prefect_flux_kontext.ledger.records import Entry
    from prefect_flux_kontext.models import GenerationRequest, StoredImage
    from prefect_flux_kontext.references.resolver import References
    from prefect_flux_kontext.settings import FluxKontextSettings
    from prefect_flux_kontext.storage.filesystem import OutputFolder

_RECHECK_SECONDS = 0.5

_under_way: set[tuple[str, str]] = set()
"""Ledger and row key of the requests that this process is submitting, in any of its threads."""


async def submit_once(
    client: FluxKontextClient,
    request: GenerationRequest,
    output: OutputFolder,
    key: str | None,
    references: References,
    settings: FluxKontextSettings,
    account: str,
    callbacks: CallbackOptions,
) -> Entry:
    """Submit a request, unless the ledger has an attempt of it already.

    Args:
        client: The client of the service, which is open.
        request: What to create.
        output: The folder whose ledger records it.
        key: Makes equal requests different ones.
        references: Makes local and private reference images available to the service.
        settings: The settings from the environment.
        account: Label of the account.
        callbacks: How callbacks are received, in another process.

    Returns:
        The request as recorded: accepted, failed or stored.

    Raises:
        ConfigurationError: The store cannot hold a ledger, the ledger belongs to another service
            or account, or a run with a budget is using it.
        ReplyLostError: Whether the request was accepted is unknown; so for ServiceTroubleError
            and UnreadableReplyError. The message says how to settle it.
        LedgerError: The ledger cannot be read or written. Nothing was submitted.
        ReferenceImageError: The reference image cannot be used. Nothing was submitted.
        RefusedError: The service refused the request (4xx), which costs nothing.
    """
    store = open_ledger_store(output)
    owner = await register_process(store, settings.heartbeat)
    await bind(store, client.base_url, account)
    ledger = Ledger(store, owner, settings.prices())
    if await find_budget_run(store):
        raise ConfigurationError(
            f"A run with a budget is paying into {output}. Wait until it has ended, or use "
            "another ledger."
        )
    row = await asyncio.to_thread(_make_row, request, key, references)
    called = RequestCallbacks(callbacks, store)
    entry = await ledger.read(row.key)
    while True:
        entry = await _wait_until_settled(client, ledger, entry, called)
        if entry.state not in {State.PLANNED, State.REJECTED}:
            return entry
        try:
            async with _mark_under_way(store, row.key, settings.concurrent_submits):
                name = f"{ledger.owner}-{row.key}-{entry.attempt + 1}"
                await open_wave(store, OpenWave(name=name, owner=ledger.owner, keys=[row.key]))
                gate = StopGate(settings.stop_timeout)
                posts = PostGate(1, client.is_answering, patience_seconds=settings.outage_timeout)
                reads_web = settings.match_references
                async with open_ratio_matcher(client.base_url, reads_web=reads_web) as ratios:
                    submitter = Submitter(
                        client,
                        ledger,
                        posts,
                        references=references,
                        ratios=ratios,
                        prepare=called.prepare_request,
                        gate=gate,
                    )
                    try:
                        return await submitter.submit(row, entry)
                    finally:
                        await submitter.drain()
        except RowAlreadyClaimedError:
            entry = await ledger.read(row.key)
        except (ReplyLostError, ServiceTroubleError, UnreadableReplyError) as error:
            unknown = await ledger.read(row.key)
            entry = await called.recover(client, ledger, unknown) or unknown
            if entry.state is State.INTENT:
                raise type(error)(
                    _explain_unknown(output, row.key, error),
                    task_id=error.task_id,
                    code=error.code,
                ) from None


async def read_entry(output: OutputFolder, key: str) -> Entry:
    """Read what is on record for a request.

    Raises:
        LedgerError: The ledger cannot be read.
    """
    return await Ledger(open_ledger_store(output), owner="", prices={}).read(key)


async def record_failure(output: OutputFolder, key: str, error: FluxKontextError) -> None:
    """Record that the accepted task of a request failed.

    Raises:
        LedgerError: The ledger cannot be read or written.
    """
    ledger = Ledger(open_ledger_store(output), owner="", prices={})
    entry = await ledger.read(key)
    if entry.state is State.ACCEPTED:
        await ledger.record_failed(entry, error)


async def record_images(output: OutputFolder, key: str, images: list[StoredImage]) -> None:
    """Record that the images of a request are stored, in the ledger's folder or elsewhere.

    Raises:
        LedgerError: The ledger cannot be read or written.
    """
    ledger = Ledger(open_ledger_store(output), owner="", prices={})
    entry = await ledger.read(key)
    if entry.state is State.ACCEPTED:
        files = [output.relative(image.uri) for image in images]
        await ledger.record_stored(entry, files, images)


def _make_row(request: GenerationRequest, key: str | None, references: References) -> Row:
    row_key = compute_row_key(request)
    plain = Row(id=row_key, line=0, values=request, key=row_key, name=row_key)
    (row,) = with_row_keys([plain], references)
    if not isinstance(row, Row):
        raise ReferenceImageError(f"{row.reason} Nothing was submitted.")
    row_key = row.key
    if key is not None:
        row_key = hashlib.sha256(f"{row.key} {key}".encode()).hexdigest()[:32]
    row_id = key or row_key
    return Row(id=row_id, line=0, values=request, key=row_key, name=make_safe_name(row_id))


async def _wait_until_settled(
    client: FluxKontextClient, ledger: Ledger, entry: Entry, callbacks: RequestCallbacks
) -> Entry:
    """Wait while this process or another run is submitting the request.

    Raises:
        ReplyLostError: The outcome stays unknown.
    """
    while (str(ledger.store), entry.key) in _under_way:
        await asyncio.sleep(_RECHECK_SECONDS)
        entry = await ledger.read(entry.key)
    if entry.state is State.INTENT:
        entry, _ = await ledger.wait_until_settled(entry)
    if entry.state is State.INTENT:
        entry = await callbacks.recover(client, ledger, entry) or entry
    if entry.state is State.INTENT:
        output = str(ledger.store).removesuffix("/_ledger")
        lost = ReplyLostError("An earlier submit of this request recorded no outcome.")
        raise ReplyLostError(_explain_unknown(output, entry.key, lost))
    return entry


@asynccontextmanager
async def _mark_under_way(store: object, key: str, limit: int) -> AsyncIterator[None]:
    """Mark a request as being submitted, once fewer than `limit` are: a crash leaves no more."""
    mark = (str(store), key)
    while len(_under_way) >= limit and mark not in _under_way:  # noqa: ASYNC110 - of any thread
        await asyncio.sleep(_RECHECK_SECONDS)
    if mark in _under_way:
        raise RowAlreadyClaimedError(key)
    _under_way.add(mark)
    try:
        yield
    finally:
        _under_way.discard(mark)


def _explain_unknown(output: object, key: str, error: FluxKontextError) -> str:
    return (
        f"{error.message} The request may or may not have been billed, so it is not submitted "
        f"again. Settle it: flux-kontext resolve {output} {key} --accepted TASK_ID | --rejected"
    )
