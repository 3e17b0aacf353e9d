"""Flow runs that share one account through a limit in a real Prefect server."""

import asyncio
import itertools
import subprocess
import sys
import uuid

import anyio
import pytest
from prefect import flow, get_client
from prefect.client.schemas.actions import (
    GlobalConcurrencyLimitCreate,
    GlobalConcurrencyLimitUpdate,
)
from prefect.exceptions import ParameterTypeError
from prefect.settings import PREFECT_API_URL, temporary_settings

from prefect_flux_kontext import FluxKontextCredentials, PollingCadence
from prefect_flux_kontext.errors import ConfigurationError
from prefect_flux_kontext.flows import retry_failed, style_transfer_batch
from prefect_flux_kontext.orchestration.partitions import leases
from prefect_flux_kontext.orchestration.partitions.leases import check_limit, lease_slots
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings

SLOTS, REQUESTS = 20, 6_000
CADENCE = PollingCadence(initial_delay=0.2, interval=0.2, timeout=60)

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]

# A lease is as short as Prefect allows, so that the test does not wait for two minutes.
KILLED_RUN = """
import asyncio, sys
from prefect_flux_kontext.flows import style_transfer_batch
from prefect_flux_kontext.orchestration.partitions import leases

leases.LEASE_SECONDS = 60.0
rows = [{"id": f"row-{n}", "prompt": f"a lighthouse {n}"} for n in range(2_000)]
asyncio.run(style_transfer_batch(rows, sys.argv[1], account_limit=sys.argv[2]))
"""


@pytest.fixture
def sandbox():
    """A sandbox whose limits are those of the account."""
    settings = SandboxSettings(mean=1.0, long_edge=16, slots=SLOTS, requests_per_minute=REQUESTS)
    with running_sandbox(settings) as running:
        yield running


@pytest.fixture
def account(sandbox):
    return FluxKontextCredentials(
        api_key="a",
        base_url=sandbox.url,
        concurrent_tasks=SLOTS,
        requests_per_minute=REQUESTS,
    )


@pytest.fixture(autouse=True)
def _adjust_often(monkeypatch):
    monkeypatch.setattr(leases, "RETRY_INTERVAL_SECONDS", 0.2)


async def create_limit(**options):
    """Create a limit that no other test uses, as a user does, and return its name."""
    new = GlobalConcurrencyLimitCreate(**{"name": f"my account {uuid.uuid4()}", **options})
    async with get_client() as client:
        await client.create_global_concurrency_limit(new)
    return new.name


async def create_usable_limit(account):
    name = await create_limit(limit=SLOTS)
    await check_limit(account, name)
    return name


async def count_leased(name):
    async with get_client() as client:
        return (await client.read_global_concurrency_limit_by_name(name)).active_slots


def rows(name, number):
    return [{"id": f"{name}-{n}", "prompt": f"{name} {n}"} for n in range(number)]


async def wait_until(condition, seconds=240):
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - another run makes it true
            await anyio.sleep(0.05)


class TestShare:
    async def test_share_follows_the_runs_that_live(self, account):
        name = await create_usable_limit(account)
        async with lease_slots(name, account) as first:
            assert (first.slots, first.limiter.tasks.slots) == (20, 20)
            async with lease_slots(name, account) as second:
                await wait_until(lambda: second.slots == 10)
                assert (first.slots, first.limiter.tasks.slots) == (10, 10)
                assert await count_leased(name) == 20
                async with lease_slots(name, account) as third:
                    await wait_until(lambda: first.slots == second.slots == 7)
                    await wait_until(lambda: third.slots == 6)
            await wait_until(lambda: first.limiter.tasks.slots == 20)
        assert await count_leased(name) == await count_leased(f"{name}-runs") == 0

    async def test_slots_of_running_tasks_are_kept(self, account):
        name = await create_usable_limit(account)
        async with lease_slots(name, account) as first:
            tasks = [f"task-{n}" for n in range(15)]
            for task in tasks:
                await first.limiter.tasks.acquire()
                first.limiter.tasks.record_acceptance(task)
            async with lease_slots(name, account) as second:
                await wait_until(lambda: first.limiter.tasks.slots == 10)
                await wait_until(lambda: second.slots == 5)
                assert first.slots == 15
                for task in tasks:
                    first.limiter.tasks.release_task(task)
                await wait_until(lambda: second.slots == 10)

    @pytest.mark.parametrize(("changed", "slots"), [(5, 5), (40, SLOTS)])
    async def test_share_follows_a_changed_limit(self, account, changed, slots):
        """But never beyond the account."""
        name = await create_usable_limit(account)
        async with lease_slots(name, account) as lease, get_client() as client:
            update = GlobalConcurrencyLimitUpdate(limit=changed)
            await client.update_global_concurrency_limit(name, update)
            await lease._adjust()
            assert lease.slots == lease.limiter.tasks.slots == slots

    async def test_run_that_starts_alone_has_all(self, account):
        """Also if a server that keeps leases in memory was restarted while another run ended."""
        name = await create_usable_limit(account)
        async with get_client() as client:
            await client.increment_concurrency_slots([f"{name}-runs"], 3, "concurrency")

        @flow
        async def lease_alone():
            async with lease_slots(name, account) as lease:
                return lease.slots

        assert await lease_alone() == 20


class TestRuns:
    async def test_two_runs_use_the_slots_unrefused(self, sandbox, account, tmp_path):
        name = await create_usable_limit(account)
        summaries = await asyncio.gather(
            *(
                style_transfer_batch(
                    rows(batch, 120),
                    str(tmp_path / batch),
                    account,
                    cadence=CADENCE,
                    account_limit=name,
                )
                for batch in ("first", "second")
            )
        )
        assert [summary.stored for summary in summaries] == [120, 120]
        bill = sandbox.service.bill()
        assert bill["submits_refused"] == {"requests": 0, "slots": 0}
        assert bill["statuses_refused"] == 0
        assert bill["peak_running"] > 0.7 * SLOTS
        # Both ran at the same time: each began before the other had paid for its last rows.
        order = [record["prompt"].split()[0] for record in sandbox.service.records()]
        assert len(list(itertools.groupby(order))) > 10
        assert await count_leased(name) == await count_leased(f"{name}-runs") == 0

    async def test_killed_run_gives_its_share_back(self, sandbox, account, tmp_path, prefect_api):
        name = await create_usable_limit(account)
        environment = prefect_api.environment | {
            "FLUX_KONTEXT_API_KEY": "a",
            "FLUX_KONTEXT_BASE_URL": sandbox.url,
            "FLUX_KONTEXT_CONCURRENT_TASKS": str(SLOTS),
            "FLUX_KONTEXT_REQUESTS_PER_MINUTE": str(REQUESTS),
        }

        @flow
        async def survive():
            async with lease_slots(name, account) as lease:
                killed = await asyncio.create_subprocess_exec(
                    sys.executable, "-c", KILLED_RUN, str(tmp_path), name, env=environment
                )
                try:
                    await wait_until(lambda: sandbox.service.bill()["accepted"] >= 10)
                    assert lease.slots == 10
                finally:
                    killed.kill()
                    await killed.wait()
                await wait_until(lambda: lease.slots == 20)

        await survive()


class TestRefusal:
    @pytest.fixture(params=["batch", "retry"])
    def run(self, request, account, tmp_path):
        """Run a flow with a limit, which must refuse it and pay for nothing."""

        async def run(name, error=ConfigurationError):
            if request.param == "retry":
                (tmp_path / "failed.csv").write_text("id,prompt\na,oil\n")
                running = retry_failed(str(tmp_path), account, account_limit=name)
            else:
                running = style_transfer_batch(
                    rows("row", 2), str(tmp_path), account, account_limit=name
                )
            with pytest.raises(error) as raised:
                await running
            return str(raised.value)

        return run

    @pytest.fixture(autouse=True)
    def _expect_no_payment(self, sandbox):
        yield
        assert sandbox.service.bill()["accepted"] == 0

    async def test_unknown_limit_names_the_command(self, run):
        message = await run("my acount")
        assert message.endswith("Create it: prefect gcl create 'my acount' --limit 20")

    @pytest.mark.parametrize(
        ("options", "problem"),
        [
            ({"limit": 21}, "has 21 slots, the account has 20"),
            ({"limit": 20, "active": False}, "is inactive"),
            ({"limit": 20, "slot_decay_per_second": 1.0}, "is a rate limit"),
        ],
    )
    async def test_unusable_limit_names_the_command(self, run, options, problem):
        name = await create_limit(**options)
        message = await run(name)
        assert problem in message
        assert f"prefect gcl update '{name}' --limit 20" in message

    async def test_command_of_the_message_makes_it_usable(self, account, prefect_api):
        name = await create_limit(limit=30, active=False, slot_decay_per_second=1.0)
        with pytest.raises(ConfigurationError) as raised:
            await check_limit(account, name)
        command = str(raised.value).rpartition("limit: prefect ")[2]
        await asyncio.to_thread(
            subprocess.run,
            f"{sys.executable} -m prefect {command}",
            shell=True,
            check=True,
            env=prefect_api.environment,
        )
        await check_limit(account, name)

    async def test_empty_name_is_refused(self, run):
        assert "account_limit" in await run("", ParameterTypeError)

    async def test_missing_server_is_refused(self, account):
        with (
            temporary_settings(restore_defaults={PREFECT_API_URL}),
            pytest.raises(ConfigurationError, match="Set PREFECT_API_URL"),
        ):
            await check_limit(account, "my account")
