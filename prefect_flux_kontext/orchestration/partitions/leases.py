"""Leases of the account's slots, which are a global concurrency limit of Prefect.

The holder of a block of slots may run that many tasks at a time, and send its share of the
account's requests. It renews its lease while it lives; the lease of a killed holder expires.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

import httpx
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import (
    GlobalConcurrencyLimitCreate,
    GlobalConcurrencyLimitUpdate,
)
from prefect.client.schemas.filters import (
    FlowRunFilter,
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

from prefect_flux_kontext.errors import BatchStoppedError, ConfigurationError, FluxKontextError
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
"""Before the next request for a lease that is not granted, or renewal of one after a failure."""

_REQUEST_TIMEOUT_SECONDS = 10.0
_LOG_INTERVAL_SECONDS = 60.0
_CREATE_COMMAND = "flux-kontext limits create"


class Share(NamedTuple):
    """A share of an account's limits: tasks at a time, and requests a minute."""

    slots: int
    requests_per_minute: int

    def apply_to(self, account: FluxKontextCredentials) -> FluxKontextCredentials:
        """Return the account with the limits of this share."""
        limits = {"concurrent_tasks": self.slots, "requests_per_minute": self.requests_per_minute}
        return account.model_copy(update=limits)


def get_limit_name(account: FluxKontextCredentials) -> str:
    """Return the name of an account's limit in Prefect, which contains the account's label."""
    return f"flux-kontext-{make_safe_name(account.account)}-slots"


async def create_limit(account: FluxKontextCredentials) -> str:
    """Create the limit of an account, or update it, and return what was done as text.

    Raises:
        ConfigurationError: Prefect did not create or update it.
    """
    name, slots = get_limit_name(account), account.concurrent_tasks
    try:
        async with get_client() as client:
            known = await _read_limit(client, name)
            if known is None:
                await client.create_global_concurrency_limit(
                    GlobalConcurrencyLimitCreate(name=name, limit=slots)
                )
                return f"{name}: created with {slots:,} slots"
            if known.limit == slots and known.active:
                return f"{name}: unchanged, {slots:,} slots, {known.active_slots:,} leased"
            await client.update_global_concurrency_limit(
                name, GlobalConcurrencyLimitUpdate(limit=slots, active=True)
            )
            return f"{name}: updated from {known.limit:,} to {slots:,} slots"
    except httpx.HTTPError as error:
        raise ConfigurationError(f"Prefect did not create the limit {name}: {error}") from None


async def read_account_limit(account: FluxKontextCredentials, partitions: int) -> Share:
    """Return the share that each partition may lease. Create the limit if there is none.

    Raises:
        ConfigurationError: There is no limit and it cannot be created, it has more slots than the
            account, it is inactive, or it has fewer slots than there are partitions.
    """
    name = get_limit_name(account)
    try:
        async with get_client() as client:
            limit = await _read_limit(client, name)
            if limit is None:
                new = GlobalConcurrencyLimitCreate(name=name, limit=account.concurrent_tasks)
                with contextlib.suppress(ObjectAlreadyExists):  # another process has created it
                    await client.create_global_concurrency_limit(new)
                    logger.info("Created the limit %s in Prefect with %d slots.", name, new.limit)
                limit = await client.read_global_concurrency_limit_by_name(name)
    except httpx.HTTPError as error:
        raise ConfigurationError(
            f"Prefect has no limit {name}, and creating it failed ({error}). "
            f"Create it: {_CREATE_COMMAND}"
        ) from None
    if limit.limit > account.concurrent_tasks or not limit.active:
        inactive = "" if limit.active else " and is inactive"
        raise ConfigurationError(
            f"The limit {name} in Prefect has {limit.limit:,} slots{inactive}, the account has "
            f"{account.concurrent_tasks:,}. Update the limit: {_CREATE_COMMAND}"
        )
    slots = limit.limit // partitions
    if not slots:
        raise ConfigurationError(
            f"{partitions} partitions cannot share the {limit.limit:,} slots of {name}. "
            "Use fewer partitions."
        )
    return Share(slots, max(1, account.requests_per_minute * slots // account.concurrent_tasks))


async def _read_limit(client: PrefectClient, name: str) -> GlobalConcurrencyLimitResponse | None:
    try:
        return await client.read_global_concurrency_limit_by_name(name)
    except ObjectNotFound:
        return None


@asynccontextmanager
async def lease_slots(account: FluxKontextCredentials, slots: int) -> AsyncIterator[Lease]:
    """Wait for a number of the account's slots, and hold them while the block runs.

    The flow run gets the name of the limit as a tag, by which others see that it holds slots.

    Raises:
        ConfigurationError: The account has no limit, or Prefect does not grant the lease.
    """
    async with get_client() as client:
        lease = Lease(client, get_limit_name(account), slots)
        await lease.acquire()
        if flow_run.id is not None:
            with contextlib.suppress(httpx.HTTPError):  # the slots are leased without it too
                tags = {*flow_run.tags, lease.name}
                await client.update_flow_run(UUID(flow_run.id), tags=tags)
        renewing = asyncio.create_task(lease.keep_renewed())
        try:
            yield lease
        finally:
            renewing.cancel()
            await asyncio.wait({renewing})
            await asyncio.shield(lease.release())


class Lease:
    """A lease of a block of slots."""

    def __init__(self, client: PrefectClient, name: str, slots: int) -> None:
        self._client = client
        self.name = name
        self._slots = slots
        self._id: Any = None
        self._held_until = 0.0
        self._lost: FluxKontextError | None = None
        self._submitter: Submitter | None = None

    def stop_when_lost(self, submitter: Submitter) -> None:
        """Stop the submitter that uses the slots once the lease is lost."""
        self._submitter = submitter
        if self._lost is not None:
            submitter.stop(self._lost)

    async def acquire(self) -> None:
        """Wait for the slots.

        Raises:
            ConfigurationError: There is no such limit, or Prefect does not grant the lease.
        """
        clock = asyncio.get_running_loop().time
        asked_at, logged_at = clock(), -_LOG_INTERVAL_SECONDS
        while not await self._try_acquire():
            if clock() - logged_at >= _LOG_INTERVAL_SECONDS:
                logged_at = clock()
                logger.info(
                    "Waiting for %d slots of %s: other runs have leased them, or Prefect's API "
                    "does not answer.",
                    self._slots,
                    self.name,
                )
            await asyncio.sleep(RETRY_INTERVAL_SECONDS)
            if clock() - asked_at > LEASE_SECONDS:
                await self._free_forgotten_slots()

    async def keep_renewed(self) -> None:
        """Renew the lease until it is lost or this is cancelled."""
        clock = asyncio.get_running_loop().time
        pause = RENEWAL_INTERVAL_SECONDS
        while True:
            await asyncio.sleep(pause)
            try:
                async with asyncio.timeout(_REQUEST_TIMEOUT_SECONDS):
                    await self._renew()
                pause = RENEWAL_INTERVAL_SECONDS
            except Exception as error:  # noqa: BLE001 - Prefect's API may come back
                logger.debug("The lease of %s was not renewed: %s", self.name, error)
                pause = RETRY_INTERVAL_SECONDS
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
                await self._client.release_concurrency_slots_with_lease(self._id)
        except Exception as error:  # noqa: BLE001 - the lease expires
            logger.debug("The lease of %s was not released: %s", self.name, error)

    async def _free_forgotten_slots(self) -> None:
        """Set the count of leased slots to zero if no flow run holds any.

        A server with leases in memory forgets them when it restarts, but not their count. The
        leases of flow runs that died have expired by now.
        """
        holds = FlowRunFilter(
            tags=FlowRunFilterTags(all_=[self.name]),
            state=FlowRunFilterState(
                type=FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.CANCELLING])
            ),
        )
        with contextlib.suppress(httpx.HTTPError):
            if not await self._client.read_flow_runs(flow_run_filter=holds, limit=1):
                logger.warning("No flow run holds slots of %s, so all are free.", self.name)
                await self._client.update_global_concurrency_limit(
                    self.name, GlobalConcurrencyLimitUpdate(active_slots=0)
                )

    async def _renew(self) -> None:
        asked_at = asyncio.get_running_loop().time()
        try:
            await self._client.renew_concurrency_lease(self._id, LEASE_SECONDS)
        except httpx.HTTPStatusError as error:
            if error.response.status_code != httpx.codes.GONE or asked_at > self._held_until:
                raise
            # The lease cannot have expired yet, so a server that keeps leases in memory has been
            # restarted. It still counts the slots, so no other run has them.
            await self._client.release_concurrency_slots([self.name], self._slots, LEASE_SECONDS)
            if not await self._try_acquire():
                raise
            return
        self._held_until = asked_at + LEASE_SECONDS

    async def _try_acquire(self) -> bool:
        asked_at = asyncio.get_running_loop().time()
        try:
            reply = await self._client.increment_concurrency_slots_with_lease(
                [self.name], self._slots, "concurrency", LEASE_SECONDS
            )
        except httpx.TransportError:
            return False
        except httpx.HTTPStatusError as error:
            if error.response.status_code == httpx.codes.LOCKED:
                return False
            raise ConfigurationError(
                f"Prefect did not grant a lease of {self._slots} slots of {self.name}: {error}"
            ) from None
        granted = ConcurrencyLimitWithLeaseResponse.model_validate(reply.json())
        if not granted.limits:
            raise ConfigurationError(
                f"Prefect has no limit {self.name}. Create it: {_CREATE_COMMAND}"
            )
        self._id, self._held_until = granted.lease_id, asked_at + LEASE_SECONDS
        return True

    def _mark_lost(self) -> None:
        self._lost = BatchStoppedError(
            f"The lease of {self._slots} slots of {self.name} could not be renewed, so another "
            "run may hold them. Submitted rows are stored; a later run submits the rest."
        )
        if self._submitter is not None:
            self._submitter.stop(self._lost)
