"""The account's slots as a global concurrency limit of Prefect, leased in blocks.

Who holds a block of slots may run so many tasks at once, and send its share of the account's
requests. A lease is renewed while its holder lives; that of a killed one ends by itself.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import (
    GlobalConcurrencyLimitCreate,
    GlobalConcurrencyLimitUpdate,
)
from prefect.client.schemas.responses import ConcurrencyLimitWithLeaseResponse
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from prefect_flux_kontext.errors import BatchStoppedError, ConfigurationError
from prefect_flux_kontext.storage.names import safe_name

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from uuid import UUID

    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.responses import GlobalConcurrencyLimitResponse

    from prefect_flux_kontext.batch.submission import Submitter
    from prefect_flux_kontext.credentials import FluxKontextCredentials
    from prefect_flux_kontext.errors import FluxKontextError

logger = logging.getLogger(__name__)

LEASE_SECONDS = 120.0
"""What a killed holder's slots are kept for, and what an outage of Prefect may last."""

RENEWED_EVERY = 20.0
_TRIED_AGAIN = 5.0
_PATIENCE = 10.0
_TOLD_EVERY = 60.0
_COMMAND = "flux-kontext limits create"


class Share(NamedTuple):
    """A block of an account's slots.

    Attributes:
        slots: Tasks that its holder may run at once.
        requests_per_minute: Requests that go with them.
    """

    slots: int
    requests_per_minute: int

    def of(self, account: FluxKontextCredentials) -> FluxKontextCredentials:
        """The account as the holder of the block sees it."""
        limits = {
            "concurrent_tasks": self.slots,
            "requests_per_minute": self.requests_per_minute,
        }
        return account.model_copy(update=limits)


def limit_name(account: FluxKontextCredentials) -> str:
    """The name of an account's limit in Prefect, after the account's label."""
    return f"flux-kontext-{safe_name(account.account)}-slots"


async def create_limit(account: FluxKontextCredentials) -> str:
    """Create the limit of an account, or bring it up to date, and say what was done.

    Raises:
        ConfigurationError: Prefect does not do it.
    """
    name, slots = limit_name(account), account.concurrent_tasks
    try:
        async with get_client() as client:
            known = await _read(client, name)
            if known is None:
                await client.create_global_concurrency_limit(
                    GlobalConcurrencyLimitCreate(name=name, limit=slots)
                )
                return f"{name}: created, {slots:,} slots"
            if known.limit == slots and known.active:
                return f"{name}: is there, {slots:,} slots, {known.active_slots:,} leased"
            await client.update_global_concurrency_limit(
                name, GlobalConcurrencyLimitUpdate(limit=slots, active=True)
            )
            return f"{name}: brought up to date, {known.limit:,} to {slots:,} slots"
    except httpx.HTTPError as error:
        raise ConfigurationError(f"Prefect did not create the limit {name}: {error}") from None


async def read_account_limit(account: FluxKontextCredentials, partitions: int) -> Share:
    """Return what each partition may lease; create the limit where there is none.

    Raises:
        ConfigurationError: There is no limit and none can be created, it is not the account's, or
            it has fewer slots than there are partitions.
    """
    name = limit_name(account)
    try:
        async with get_client() as client:
            limit = await _read(client, name)
            if limit is None:
                await _create(client, name, account.concurrent_tasks)
                limit = await client.read_global_concurrency_limit_by_name(name)
    except httpx.HTTPError as error:
        raise ConfigurationError(
            f"There is no limit {name} in Prefect, and it could not be created here ({error}). "
            f"Create it: {_COMMAND}"
        ) from None
    if limit.limit > account.concurrent_tasks or not limit.active:
        off = "" if limit.active else " and is switched off"
        raise ConfigurationError(
            f"The limit {name} in Prefect has {limit.limit:,} slots{off}, the account has "
            f"{account.concurrent_tasks:,}. Bring it up to date: {_COMMAND}"
        )
    slots = limit.limit // partitions
    if not slots:
        raise ConfigurationError(
            f"{partitions} partitions cannot share the {limit.limit:,} slots of {name}. "
            "Use fewer partitions."
        )
    return Share(slots, max(1, account.requests_per_minute * slots // account.concurrent_tasks))


async def _create(client: PrefectClient, name: str, slots: int) -> None:
    try:
        limit = GlobalConcurrencyLimitCreate(name=name, limit=slots)
        await client.create_global_concurrency_limit(limit)
    except ObjectAlreadyExists:
        return  # somebody else was quicker
    logger.info("Created the limit %s in Prefect, with %d slots.", name, slots)


async def _read(client: PrefectClient, name: str) -> GlobalConcurrencyLimitResponse | None:
    try:
        return await client.read_global_concurrency_limit_by_name(name)
    except ObjectNotFound:
        return None


@asynccontextmanager
async def lease_slots(account: FluxKontextCredentials, slots: int) -> AsyncIterator[Lease]:
    """Hold so many of an account's slots while the block runs; waits until they are free.

    Raises:
        ConfigurationError: The account has no limit, or Prefect does not lease it.
    """
    async with get_client() as client:
        lease = Lease(client, limit_name(account), slots)
        await lease.take()
        renewing = asyncio.create_task(lease.keep())
        try:
            yield lease
        finally:
            renewing.cancel()
            await asyncio.wait({renewing})
            await asyncio.shield(lease.end())


class Lease:
    """A block of slots that is held.

    Args:
        client: Prefect.
        name: The limit.
        slots: How many.

    """

    def __init__(self, client: PrefectClient, name: str, slots: int) -> None:
        self._client = client
        self._name = name
        self._slots = slots
        self._id: UUID | None = None
        self._held_until = 0.0
        self._lost: FluxKontextError | None = None
        self._submitter: Submitter | None = None

    def held_for(self, submitter: Submitter) -> None:
        """Name who uses the slots: it is stopped when they are not held any more."""
        self._submitter = submitter
        if self._lost is not None:
            submitter.stop(self._lost)

    async def take(self) -> None:
        """Wait for the slots.

        Raises:
            ConfigurationError: There is no such limit, or Prefect does not lease it.
        """
        clock = asyncio.get_running_loop().time
        told_at = -_TOLD_EVERY
        while not await self._leased():
            if clock() - told_at >= _TOLD_EVERY:
                told_at = clock()
                logger.info(
                    "Waiting for %d slots of %s, which others have leased.",
                    self._slots,
                    self._name,
                )
            await asyncio.sleep(_TRIED_AGAIN)

    async def keep(self) -> None:
        """Renew the lease, for ever or until it is lost."""
        clock = asyncio.get_running_loop().time
        pause = RENEWED_EVERY
        while True:
            await asyncio.sleep(pause)
            try:
                async with asyncio.timeout(_PATIENCE):
                    await self._renew()
                pause = RENEWED_EVERY
            except Exception as error:  # noqa: BLE001 - whatever it is, Prefect may come back
                logger.debug("The lease of %s was not renewed: %s", self._name, error)
                pause = _TRIED_AGAIN
                if clock() > self._held_until - _TRIED_AGAIN - _PATIENCE:
                    self._lose()
                    return

    async def end(self) -> None:
        """Give the slots back; where tasks hold them still, the lease is left to end by itself."""
        tasks_run_on = self._submitter is not None and self._submitter.outstanding
        if self._lost is not None or tasks_run_on:
            return
        try:
            async with asyncio.timeout(_PATIENCE):
                await self._client.release_concurrency_slots_with_lease(self._lease_id)
        except Exception as error:  # noqa: BLE001 - the lease ends by itself then
            logger.debug("The lease of %s was not given back: %s", self._name, error)

    async def _renew(self) -> None:
        asked_at = asyncio.get_running_loop().time()
        try:
            await self._client.renew_concurrency_lease(self._lease_id, LEASE_SECONDS)
        except httpx.HTTPStatusError as error:
            if error.response.status_code != httpx.codes.GONE or asked_at > self._held_until:
                raise
            # It cannot have ended yet: a server that keeps leases in memory was started anew. It
            # still counts the slots, so that nobody else has them.
            await self._client.release_concurrency_slots([self._name], self._slots, LEASE_SECONDS)
            if not await self._leased():
                raise
            return
        self._held_until = asked_at + LEASE_SECONDS

    async def _leased(self) -> bool:
        asked_at = asyncio.get_running_loop().time()
        try:
            reply = await self._client.increment_concurrency_slots_with_lease(
                [self._name], self._slots, "concurrency", LEASE_SECONDS
            )
        except httpx.HTTPStatusError as error:
            if error.response.status_code == httpx.codes.LOCKED:
                return False
            raise ConfigurationError(
                f"Prefect does not lease {self._slots} slots of {self._name}: {error}"
            ) from None
        granted = ConcurrencyLimitWithLeaseResponse.model_validate(reply.json())
        if not granted.limits:
            raise ConfigurationError(
                f"There is no limit {self._name} in Prefect. Create it: {_COMMAND}"
            )
        self._id, self._held_until = granted.lease_id, asked_at + LEASE_SECONDS
        return True

    @property
    def _lease_id(self) -> UUID:
        assert self._id is not None  # noqa: S101 - it was taken first
        return self._id

    def _lose(self) -> None:
        self._lost = BatchStoppedError(
            f"The lease of {self._slots} slots of {self._name} could not be renewed, so they may "
            "be another's by now. What is submitted is stored; a later run submits the rest."
        )
        if self._submitter is not None:
            self._submitter.stop(self._lost)
