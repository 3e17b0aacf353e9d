"""Leases of the account's slots from a real Prefect server."""

import asyncio
import itertools
import uuid

import anyio
import httpx
import pytest
from prefect import flow, get_client
from prefect.client.schemas.responses import GlobalConcurrencyLimitResponse

from prefect_flux_kontext import FluxKontextCredentials
from prefect_flux_kontext.cli import main
from prefect_flux_kontext.errors import BatchStoppedError, ConfigurationError
from prefect_flux_kontext.orchestration.partitions import leases
from prefect_flux_kontext.orchestration.partitions.leases import (
    LEASE_SECONDS,
    Lease,
    check_limit,
    create_limit,
    get_limit_name,
    lease_slots,
)
from tests.orchestration.conftest import KEY

LIMIT = {"id": str(uuid.uuid4()), "name": "slots", "limit": 40}

pytestmark = pytest.mark.anyio


@pytest.fixture
def account():
    """An account with a limit that no other test uses."""
    return FluxKontextCredentials(
        api_key=KEY,
        base_url="http://127.0.0.1:1",
        account=f"account-{uuid.uuid4()}",
        concurrent_tasks=40,
        requests_per_minute=600,
    )


class FakeSubmitter:
    """The part of a submitter that a lease uses."""

    def __init__(self, *outstanding):
        self.outstanding = set(outstanding)
        self.stopped = None

    def stop(self, error):
        self.stopped = error


async def count_leased(account):
    async with get_client() as client:
        limit = await client.read_global_concurrency_limit_by_name(get_limit_name(account))
        return limit.active_slots


class TestLimit:
    def test_command_creates_and_updates_the_limit(self, monkeypatch, capsys):
        label = f"account-{uuid.uuid4()}"
        monkeypatch.setenv("FLUX_KONTEXT_API_KEY", KEY)
        monkeypatch.setenv("FLUX_KONTEXT_ACCOUNT", label)
        lines = []
        for slots in ("40", "40", "60"):
            monkeypatch.setenv("FLUX_KONTEXT_CONCURRENT_TASKS", slots)
            assert main(["limits", "create"]) == 0
            lines.append(capsys.readouterr().out.removeprefix(f"flux-kontext-{label}-slots: "))
        assert lines == [
            "created with 40 slots\n",
            "unchanged, 40 slots, 0 leased\n",
            "updated from 40 to 60 slots\n",
        ]

    async def test_missing_limit_of_the_account_is_created(self, account):
        await check_limit(account, get_limit_name(account), runs=3)
        assert await count_leased(account) == 0

    async def test_limit_below_the_account_is_shared(self, account):
        name = get_limit_name(account)
        await create_limit(account.model_copy(update={"concurrent_tasks": 20}))
        await check_limit(account, name, runs=2)
        async with lease_slots(name, account) as lease:
            assert lease.limiter.tasks.slots == lease.slots == 20
            # 300 a minute and not 600: a burst of 6, and then one each 61.2 / (300 - 6 + 1) s.
            assert lease.limiter.requests.spacing == pytest.approx(61.2 / 295)

    async def test_limit_above_the_account_is_refused(self, account):
        await create_limit(account.model_copy(update={"concurrent_tasks": 50}))
        with pytest.raises(ConfigurationError, match=r"has 50 slots, the account has 40.*create"):
            await check_limit(account, get_limit_name(account))

    async def test_more_partitions_than_slots_are_refused(self, account):
        with pytest.raises(ConfigurationError, match="41 partitions cannot share the 40 slots"):
            await check_limit(account, get_limit_name(account), runs=41)

    async def test_lease_without_a_limit_is_refused(self, account):
        with pytest.raises(ConfigurationError, match=r"no limit .* Create it: flux"):
            async with lease_slots(get_limit_name(account), account):
                pass

    async def test_outage_of_prefect_names_the_command(self, account, monkeypatch):
        async def refuse(*_args):
            raise httpx.ConnectError("connection refused")

        monkeypatch.setattr(leases, "_read_limit", refuse)
        with pytest.raises(ConfigurationError, match=r"connection refused.*limits create"):
            await check_limit(account, get_limit_name(account))
        with pytest.raises(ConfigurationError, match="connection refused"):
            await create_limit(account)


class TestLease:
    async def test_run_without_a_free_slot_waits(self, account, monkeypatch):
        monkeypatch.setattr(leases, "RETRY_INTERVAL_SECONDS", 0.05)
        account = account.model_copy(update={"concurrent_tasks": 1})
        await create_limit(account)
        second = asyncio.Event()

        async def lease_second():
            async with lease_slots(get_limit_name(account), account):
                second.set()

        async with anyio.create_task_group() as group:
            async with lease_slots(get_limit_name(account), account):
                group.start_soon(lease_second)
                await anyio.sleep(0.3)
                assert not second.is_set()
            await asyncio.wait_for(second.wait(), 60)
        assert await count_leased(account) == 0

    async def test_slots_of_running_tasks_are_not_released(self, account):
        await create_limit(account)
        async with lease_slots(get_limit_name(account), account) as lease:
            lease.stop_when_lost(FakeSubmitter("a row that is paid for"))
        assert await count_leased(account) == 40

    async def test_lost_lease_stops_the_submitter(self, account, monkeypatch):
        monkeypatch.setattr(leases, "RENEWAL_INTERVAL_SECONDS", 0.0)
        monkeypatch.setattr(leases, "RETRY_INTERVAL_SECONDS", 0.0)
        await create_limit(account)
        submitter, late = FakeSubmitter(), FakeSubmitter()
        async with get_client() as client:
            lease = Lease(client, get_limit_name(account))
            await lease.acquire()
            lease.stop_when_lost(submitter)
            await client.release_concurrency_slots_with_lease(*lease._blocks)
            lease._held_until = 0.0
            await lease.keep_renewed()
        assert isinstance(submitter.stopped, BatchStoppedError)
        lease.stop_when_lost(late)
        assert late.stopped is submitter.stopped

    async def test_lease_unknown_to_a_restarted_server_is_replaced(self, account):
        await create_limit(account)
        async with get_client() as client:
            lease = Lease(client, get_limit_name(account))
            await lease.acquire()
            (first,) = lease._blocks
            # As after a restart: the server counts the slots, but has no lease of them.
            await client.increment_concurrency_slots([get_limit_name(account)], 1, "concurrency")
            await client.release_concurrency_slots_with_lease(first)
            await lease._renew()
            assert first not in lease._blocks
            assert await count_leased(account) == 1
            await lease.release()
        assert await count_leased(account) == 0

    async def test_slots_that_no_flow_run_holds_are_freed(self, account):
        """As after a restart of a server that keeps leases in memory, and the end of all runs."""
        await create_limit(account)
        name = get_limit_name(account)
        holding, is_seen = asyncio.Event(), asyncio.Event()

        @flow
        async def hold_slots():
            async with lease_slots(name, account):
                holding.set()
                await is_seen.wait()

        async with get_client() as client:
            await client.increment_concurrency_slots([name], 30, "concurrency")
            async with anyio.create_task_group() as group:
                group.start_soon(hold_slots)
                await holding.wait()
                await Lease(client, name).free_forgotten_slots()
                assert await count_leased(account) == 40
                is_seen.set()
            assert await count_leased(account) == 30
            await Lease(client, name).free_forgotten_slots()
        assert await count_leased(account) == 0


class FakeClient:
    """A client of Prefect's API, which is unavailable for some renewals."""

    def __init__(self, answered, failed):
        self.replies = itertools.chain([True] * answered, [False] * failed, itertools.repeat(True))

    async def renew_concurrency_lease(self, lease_id, lease_duration):
        if not next(self.replies):
            await asyncio.sleep(5)
            raise httpx.ConnectError("connection refused")


class ReturningClient:
    """A client of Prefect's API, which answers only after some seconds."""

    def __init__(self, seconds):
        self.answers_at = asyncio.get_running_loop().time() + seconds

    async def increment_concurrency_slots_with_lease(self, *_args):
        self._check()
        granted = {"lease_id": str(uuid.uuid4()), "limits": [LIMIT]}
        return httpx.Response(200, json=granted)

    async def read_global_concurrency_limit_by_name(self, name):
        self._check()
        return GlobalConcurrencyLimitResponse(name=name, limit=40, active_slots=40)

    async def read_flow_runs(self, **_filters):
        self._check()
        return ["another flow run"]

    def _check(self):
        if asyncio.get_running_loop().time() < self.answers_at:
            raise httpx.ConnectError("connection refused")


@pytest.mark.virtual_time
class TestOutage:
    async def test_lease_waits_for_the_end_of_an_outage(self):
        started_at = asyncio.get_running_loop().time()
        lease = Lease(ReturningClient(600), "slots")
        await lease.acquire()
        assert 600 <= lease._held_until - started_at - LEASE_SECONDS < 610

    async def hold(self, failed, seconds):
        """Hold a lease for some seconds; return whether it was lost, and the submitter's error."""
        loop = asyncio.get_running_loop()
        lease, submitter = Lease(FakeClient(3, failed), "slots"), FakeSubmitter()
        lease._blocks = {uuid.uuid4(): 20}
        lease._held_until = loop.time() + LEASE_SECONDS
        lease.stop_when_lost(submitter)
        keeping = asyncio.create_task(lease.keep_renewed())
        await asyncio.sleep(seconds)
        over = keeping.done()
        keeping.cancel()
        return over, submitter.stopped

    async def test_outage_shorter_than_the_lease_stops_nothing(self):
        assert await self.hold(failed=8, seconds=3_600) == (False, None)

    async def test_submitter_stops_before_the_lease_expires(self):
        # The last renewal is at 60 s, so the lease ends at 180 s.
        over, stopped = await self.hold(failed=1_000, seconds=179)
        assert over
        assert "could not be renewed" in str(stopped)


@pytest.mark.parametrize("slots", [1, 4, 10, 40, 300, 1_000])
def test_shares_leave_slots_for_every_run(slots):
    for runs in range(1, slots + 1):
        share = leases.compute_share(slots, runs)
        assert 1 <= share <= slots
        assert share * (runs - 1) < slots
