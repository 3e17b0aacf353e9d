"""The head record: a ledger belongs to one service and one account."""

import pytest

from prefect_flux_kontext.errors import ConfigurationError, LedgerError
from prefect_flux_kontext.ledger.head import FORMAT, bind, check_format, rebind

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("root", ["disk"], indirect=True)]

REAL = "https://api.example.com"


async def test_first_run_binds_the_ledger(store):
    assert await check_format(store) is None
    await bind(store, REAL, "studio")
    head = await check_format(store)
    assert (head.service, head.account, head.format) == (REAL, "studio", FORMAT)
    await bind(store, f"{REAL.upper()}/v2/", "studio")
    assert await check_format(store) == head


@pytest.mark.parametrize(
    ("base_url", "account"),
    [
        (REAL, "other"),
        ("http://api.example.com", "studio"),
        ("https://api.example.com:8443", "studio"),
        ("https://api.example.org", "studio"),
        ("http://127.0.0.1:8765", "studio"),
    ],
)
async def test_other_service_or_account_is_refused(store, base_url, account):
    await bind(store, REAL, "studio")
    with pytest.raises(ConfigurationError, match="flux-kontext rebind") as caught:
        await bind(store, base_url, account)
    assert REAL in str(caught.value)
    assert (await check_format(store)).service == REAL


async def test_sandboxes_of_this_machine_are_one_service(store):
    urls = ["http://127.0.0.1:1", "http://127.0.0.1:2", "http://localhost:3", "http://[::1]:4"]
    urls += ["http://x.localhost:5", "http://[::ffff:127.0.0.1]:6"]
    for url in urls:
        await bind(store, url, "default")
    with pytest.raises(ConfigurationError, match="this machine"):
        await bind(store, REAL, "default")


async def test_rebind_changes_service_and_account(store):
    await bind(store, REAL, "studio")
    await rebind(store, "https://api.example.org", "other")
    await bind(store, "https://api.example.org", "other")
    with pytest.raises(ConfigurationError):
        await bind(store, REAL, "studio")


async def test_ledger_of_a_newer_release_is_refused(store):
    newer = b'{"format": 9, "oldest_reader": 2, "service": "x", "account": "y"}'
    await store.replace("format.json", newer)
    with pytest.raises(LedgerError, match="upgrade prefect-flux-kontext"):
        await bind(store, REAL, "studio")


async def test_newer_format_that_this_release_reads_is_accepted(store):
    newer = f'{{"format": 9, "oldest_reader": 1, "service": "{REAL}", "account": "y", "new": 1}}'
    await store.replace("format.json", newer.encode())
    await bind(store, REAL, "y")


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"{}", b'{"format": "x"}'])
async def test_damaged_head_is_reported(store, damage):
    await store.replace("format.json", damage)
    with pytest.raises(LedgerError, match=r"format\.json is damaged.*rebind"):
        await check_format(store)
    await rebind(store, REAL, "studio")
    await bind(store, REAL, "studio")
