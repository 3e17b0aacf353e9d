"""Leases of the account's slots, which are a global concurrency limit of Prefect.

The holder of slots may run that many tasks at a time, and send its share of the account's
requests. It renews its lease while it lives; the lease of a killed holder expires. The flow runs
that live share all slots equally, and adjust their shares as runs begin and end; a second limit
counts them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import shlex
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from operator import itemgetter
from typing import TYPE_CHECKING
from uuid import UUID

import httpx
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import (
    GlobalConcurrencyLimitCreate,
    GlobalConcurrencyLimitUpdate,
)
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.responses import (
    ConcurrencyLimitWithLeaseResponse,
    GlobalConcurrencyLimitResponse,
)
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.runtime import flow_run

from prefect_flux_kontext.client.limits.account import AccountLimiter
from prefect_flux_kontext.errors import BatchStoppedError, ConfigurationError, FluxKontextError
from prefect_flux_kontext.orchestration.events import require_api_url
from prefect_flux_kontext.storage.names import make_safe_name

if TYPE_CHECKING:
    from prefect_flux_kontext.batch.submission import Submitter
    from prefect_flux_kontext.credentials import FluxKontextCredentials

logger = logging.getLogger(__name__)

LEASE_SECONDS = 120.0
"""How long the slots of a killed holder stay leased, and an outage of Prefect may last."""

RENEWAL_INTERVAL_SECONDS = 20.0
"""A sixth of the lease, so that several renewals may fail."""

RETRY_INTERVAL_SECONDS = 5.0
"""Before the next request for a lease that is not granted, renewal of one after a failure, or
adjustment of a share."""

_REQUEST_TIMEOUT_SECONDS = 10.0
_LOG_INTERVAL_SECONDS = 60.0
_CREATE_COMMAND = "flux-kontext limits create"
_MAX_RUNS = 10_000
"""The size of the limit that counts runs, which it never refuses."""


def get_limit_name(account: FluxKontextCredentials) -> str:
    """Return the name of an account's limit in Prefect, which contains the account's label."""
    return f"flux-kontext-{make_safe_name(account.account)}-slots"


def _get_runs_name(name: str) -> str:
    return f"{name}-runs"


async def create_limit(account: FluxKontextCredentials) -> str:
    """Create the limit of an account, or update it, and return what was done as text.

    Raises:
        ConfigurationError: Prefect did not create or update it.
    """
    name, slots = get_limit_name(account), account.concurrent_tasks
    try:
        async with get_client() as client:
            known = await _read_limit(client, name)
            await _create_if_missing(client, _get_runs_name(name), _MAX_RUNS)
            if known is None:
                await _create_if_missing(client, name, slots)
                return f"{name}: created with {slots:,} slots"
            if known.limit == slots and known.active:
                return f"{name}: unchanged, {slots:,} slots, {known.active_slots:,} leased"
            await client.update_global_concurrency_limit(
                name, GlobalConcurrencyLimitUpdate(limit=slots, active=True)
            )
            return f"{name}: updated from {known.limit:,} to {slots:,} slots"
    except httpx.HTTPError as error:
        raise ConfigurationError(f"Prefect did not create the limit {name}: {error}") from None


async def check_limit(account: FluxKontextCredentials, name: str, *, runs: int = 1) -> None:
    """Check that a number of flow runs can share a limit. That of `get_limit_name` is created.

    Raises:
        ConfigurationError: There is no Prefect server; there is no limit and it cannot be created;
            it has more slots than the account, is inactive or is a rate limit; or it has fewer
            slots than there are runs.
    """
    require_api_url()
    own_name = get_limit_name(account)
    create = update = _CREATE_COMMAND
    if name != own_name:
        wanted = f"{shlex.quote(name)} --limit {account.concurrent_tasks}"
        create = f"prefect gcl create {wanted}"
        update = f"prefect gcl update {wanted} --slot-decay-per-second 0 --enable"
    failure = ""
    try:
        async with get_client() as client:
            limit = await _read_limit(client, name)
            if limit is None and name == own_name:
                await _create_if_missing(client, name, account.concurrent_tasks)
                limit = await _read_limit(client, name)
            if limit is not None:
                await _create_if_missing(client, _get_runs_name(name), _MAX_RUNS)
    except httpx.HTTPError as error:
        limit, failure = None, f", or it cannot be read or created ({error})"
    if limit is None:
        raise ConfigurationError(f"Prefect has no limit {name}{failure}. Create it: {create}")
    kind = "" if limit.active else " and is inactive"
    kind += " and is a rate limit" if limit.slot_decay_per_second else ""
    if kind or limit.limit > account.concurrent_tasks:
        raise ConfigurationError(
            f"The limit {name} in Prefect has {limit.limit:,} slots{kind}, the account has "
            f"{account.concurrent_tasks:,}. Update the limit: {update}"
        )
    if limit.limit < runs:
        raise ConfigurationError(
            f"{runs} partitions cannot share the {limit.limit:,} slots of {name}. "
            "Use fewer partitions."
        )


async def _create_if_missing(client: PrefectClient, name: str, slots: int) -> None:
    if await _read_limit(client, name) is None:
        new = GlobalConcurrencyLimitCreate(name=name, limit=slots)
        with contextlib.suppress(ObjectAlreadyExists):  # another process has created it
            await client.create_global_concurrency_limit(new)
            logger.info("Created the limit %s in Prefect with %d slots.", name, slots)


async def _read_limit(client: PrefectClient, name: str) -> GlobalConcurrencyLimitResponse | None:
    try:
        return await client.read_global_concurrency_limit_by_name(name)
    except ObjectNotFound:
        return None


@asynccontextmanager
async def lease_slots(name: str, account: FluxKontextCredentials) -> AsyncIterator[SharedLease]:
    """Wait for slots of a limit, and hold an equal share of all while the block runs.

    The flow run gets the name of the limit as a tag, by which others see that it holds slots.

    Raises:
        ConfigurationError: There is no such limit, or Prefect does not grant the lease.
    """
    async with get_client() as client:
        run, lease = Lease(client, _get_runs_name(name)), SharedLease(client, name, account)
        await run.add_tag()
        if flow_run.id is not None:
            await run.free_forgotten_slots()
        await run.acquire()
        renewing = [asyncio.create_task(run.keep_renewed())]
        try:
            await lease.acquire()
            renewing.append(asyncio.create_task(lease.keep_renewed()))
            await lease.add_tag()
            yield lease
        finally:
            for task in renewing:
                task.cancel()
            await asyncio.wait(renewing)
            await asyncio.shield(asyncio.gather(lease.release(), run.release()))


class Lease:
    """A lease of slots, in one block or several; at first of one slot."""

    def __init__(self, client: PrefectClient, name: str) -> None:
        self._client = client
        self.name = name
        self._blocks: dict[UUID, int] = {}  # slots by the id of their lease in Prefect
        self._held_until = 0.0
        self._expires_at = 0.0
        self._lost: FluxKontextError | None = None
        self._submitter: Submitter | None = None

    @property
    def slots(self) -> int:
        """The number of slots that are leased."""
        return sum(self._blocks.values())

    def stop_when_lost(self, submitter: Submitter) -> None:
        """Stop the submitter that uses the slots once the lease is lost."""
        self._submitter = submitter
        if self._lost is not None:
            submitter.stop(self._lost)

    async def add_tag(self) -> None:
        """Give the current flow run the name of the limit as a tag."""
        if flow_run.id is not None:
            with contextlib.suppress(httpx.HTTPError):  # the slots are leased without it too
                run = await self._client.read_flow_run(UUID(flow_run.id))
                await self._client.update_flow_run(run.id, tags={*run.tags, self.name})

    async def acquire(self) -> None:
        """Wait for a slot.

        Raises:
            ConfigurationError: There is no such limit, or Prefect does not grant the lease.
        """
        clock = asyncio.get_running_loop().time
        asked_at, logged_at = clock(), -_LOG_INTERVAL_SECONDS
        while not await self._try_acquire(1):
            if clock() - logged_at >= _LOG_INTERVAL_SECONDS:
                logged_at = clock()
                logger.info(
                    "Waiting for slots of %s: other runs have leased them, or Prefect's API does "
                    "not answer.",
                    self.name,
                )
            await asyncio.sleep(RETRY_INTERVAL_SECONDS)
            if clock() - asked_at > LEASE_SECONDS:
                await self.free_forgotten_slots()

    async def keep_renewed(self) -> None:
        """Renew and adjust the lease until it is lost or this is cancelled."""
        clock = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(RETRY_INTERVAL_SECONDS)
            try:
                async with asyncio.timeout(_REQUEST_TIMEOUT_SECONDS):
                    if clock() >= self._held_until - LEASE_SECONDS + RENEWAL_INTERVAL_SECONDS:
                        await self._renew()
                    await self._adjust()
            except Exception as error:  # noqa: BLE001 - Prefect's API may come back
                logger.debug("The lease of %s was not renewed: %s", self.name, error)
                # The next renewal could end after the lease does.
                if clock() > self._held_until - RETRY_INTERVAL_SECONDS - _REQUEST_TIMEOUT_SECONDS:
                    self._mark_lost()
                    return

    async def release(self) -> None:
        """Release the slots, unless tasks still run in them; then the lease is left to expire."""
        has_running_tasks = self._submitter is not None and self._submitter.outstanding
        if self._lost is not None or has_running_tasks:
            return
        try:
            async with asyncio.timeout(_REQUEST_TIMEOUT_SECONDS):
                for lease_id in self._blocks:
                    await self._client.release_concurrency_slots_with_lease(lease_id)
        except Exception as error:  # noqa: BLE001 - the lease expires
            logger.debug("The lease of %s was not released: %s", self.name, error)

    async def free_forgotten_slots(self) -> None:
        """Set the count of leased slots to zero if no other flow run holds any.

        A server with leases in memory forgets them when it restarts, but not their count. The
        leases of flow runs that died have expired by now.
        """
        own = [UUID(flow_run.id)] if flow_run.id is not None else []
        holds = FlowRunFilter(
            id=FlowRunFilterId(not_any_=own),
            tags=FlowRunFilterTags(all_=[self.name]),
            state=FlowRunFilterState(
                type=FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.CANCELLING])
            ),
        )
        with contextlib.suppress(httpx.HTTPError, ObjectNotFound):
            limit = await self._client.read_global_concurrency_limit_by_name(self.name)
            if limit.active_slots and not await self._client.read_flow_runs(
                flow_run_filter=holds, limit=1
            ):
                logger.warning("No flow run holds slots of %s, so all are free.", self.name)
                await self._client.update_global_concurrency_limit(
                    self.name, GlobalConcurrencyLimitUpdate(active_slots=0)
                )

    async def _adjust(self) -> None:
        """Lease more or fewer slots, if these depend on other runs."""

    async def _renew(self) -> None:
        asked_at = asyncio.get_running_loop().time()
        for lease_id, slots in list(self._blocks.items()):
            try:
                await self._client.renew_concurrency_lease(lease_id, LEASE_SECONDS)
            except httpx.HTTPStatusError as error:
                if error.response.status_code != httpx.codes.GONE or self._is_expired():
                    raise
                # The lease cannot have expired yet, so a server that keeps leases in memory has
                # been restarted. It still counts the slots, so no other run has them.
                del self._blocks[lease_id]
                held_until, self._held_until = self._held_until, -math.inf
                await self._client.release_concurrency_slots([self.name], slots, LEASE_SECONDS)
                if not await self._try_acquire(slots):
                    raise
                self._held_until = held_until
        self._hold_since(asked_at)

    def _hold_since(self, asked_at: float) -> None:
        self._held_until = asked_at + LEASE_SECONDS
        self._expires_at = time.time() + LEASE_SECONDS

    def _is_expired(self) -> bool:
        # The loop's clock stands still while the machine is suspended.
        return asyncio.get_running_loop().time() > self._held_until or (
            time.time() > self._expires_at
        )

    async def _try_acquire(self, slots: int) -> bool:
        asked_at = asyncio.get_running_loop().time()
        try:
            reply = await self._client.increment_concurrency_slots_with_lease(
                [self.name], slots, "concurrency", LEASE_SECONDS
            )
        except httpx.TransportError:
            return False
        except httpx.HTTPStatusError as error:
            if error.response.status_code == httpx.codes.LOCKED:
                return False
            raise ConfigurationError(
                f"Prefect did not grant a lease of {slots} slots of {self.name}: {error}"
            ) from None
        granted = ConcurrencyLimitWithLeaseResponse.model_validate(reply.json())
        if not granted.limits:
            raise ConfigurationError(
                f"Prefect has no limit {self.name}. Create it: {_CREATE_COMMAND}"
            )
        if not self._blocks:
            self._hold_since(asked_at)
        self._blocks[granted.lease_id] = slots
        return True

    def _mark_lost(self) -> None:
        self._lost = BatchStoppedError(
            f"The lease of {self.slots} slots of {self.name} could not be renewed, so another "
            "run may hold them. Submitted rows are stored; a later run submits the rest."
        )
        if self._submitter is not None:
            self._submitter.stop(self._lost)


class SharedLease(Lease):
    """A lease of an equal share of a limit, which follows the number of runs that share it.

    Attributes:
        limiter: Keeps the flow run within its share.
    """

    def __init__(self, client: PrefectClient, name: str, account: FluxKontextCredentials) -> None:
        super().__init__(client, name)
        self._account = account
        self.limiter = AccountLimiter(**self._get_limits(1))

    def _get_limits(self, slots: int) -> dict[str, int]:
        requests = self._account.requests_per_minute * slots // self._account.concurrent_tasks
        return {"requests_per_minute": max(1, requests), "concurrent_tasks": slots}

    async def acquire(self) -> None:
        """Wait for a slot, and lease as many more of the share as are free.

        Raises:
            ConfigurationError: There is no such limit, or Prefect does not grant the lease.
        """
        await super().acquire()
        with contextlib.suppress(httpx.HTTPError, ObjectNotFound):  # adjusted later
            await self._adjust()

    async def _adjust(self) -> None:
        """Lease free slots up to the share, or release slots above it that no task uses."""
        limit = await self._client.read_global_concurrency_limit_by_name(self.name)
        runs = await self._client.read_global_concurrency_limit_by_name(_get_runs_name(self.name))
        slots = min(limit.limit, self._account.concurrent_tasks)
        share = compute_share(slots, runs.active_slots)
        missing = min(share - self.slots, limit.limit - limit.active_slots)
        while missing > 0:
            block = math.ceil(missing / 2)  # in several blocks, so that some can be released
            if not await self._try_acquire(block):
                break
            missing -= block
        used = min(share, self.slots)
        self.limiter.resize(**self._get_limits(used))
        surplus = self.slots - max(used, self.limiter.tasks.count_busy())
        for lease_id, slots in sorted(self._blocks.items(), key=itemgetter(1), reverse=True):
            if slots <= surplus:
                surplus -= slots
                await self._release_block(lease_id)
        larger = [block for block in self._blocks.items() if block[1] > surplus]
        if surplus > 0 and larger:
            lease_id, slots = min(larger, key=itemgetter(1))
            has_rest = await self._try_acquire(slots - surplus)
            await self._release_block(lease_id)
            if not has_rest and not await self._try_acquire(slots - surplus):
                self.limiter.resize(**self._get_limits(min(share, self.slots)))

    async def _release_block(self, lease_id: UUID) -> None:
        del self._blocks[lease_id]
        await self._client.release_concurrency_slots_with_lease(lease_id)


def compute_share(slots: int, runs: int) -> int:
    """Return the slots that each of some runs may lease: one `n`th, so that none starves."""
    share = math.ceil(slots / max(1, runs))
    return share if share * (runs - 1) < slots else max(1, slots // runs)
