"""Batches on S3: with options of its own, with a busy store, with one that removes nothing."""

import asyncio
import json

import fsspec
import fsspec.config
import pytest

from prefect_flux_kontext.batch.collection import read_ledger_status
from prefect_flux_kontext.cli import main
from prefect_flux_kontext.errors import ConfigurationError, StorageError
from prefect_flux_kontext.ledger.records import State
from prefect_flux_kontext.ledger.store import open_ledger_store
from prefect_flux_kontext.manifest.reader import Manifest
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from prefect_flux_kontext.storage.filesystem import OutputFolder
from tests.support.batches import KEY, run
from tests.support.fault_proxy import fault_proxy
from tests.support.s3 import s3_server

pytestmark = pytest.mark.anyio

SECRET = "canary-of-the-store"


@pytest.fixture(scope="module")
def server():
    """An S3 that nothing but its address leads to."""
    with s3_server(configured=False) as (_, client):
        yield client


@pytest.fixture
def proxy(server):
    with fault_proxy(server.meta.endpoint_url) as running:
        yield running


@pytest.fixture
def output(proxy, tmp_path):
    return OutputFolder(f"s3://pictures/{tmp_path.name}", options(proxy))


@pytest.fixture
def sandbox():
    with running_sandbox(SandboxSettings(mean=0.1, long_edge=64, api_key=KEY)) as running:
        yield running


def options(proxy):
    return {"endpoint_url": proxy.url, "key": "testing", "secret": SECRET}


def rows(number):
    return Manifest([{"id": f"r{n}", "prompt": f"number {n}"} for n in range(number)])


def names(server, folder):
    pages = server.get_paginator("list_objects_v2").paginate(
        Bucket="pictures", Prefix=f"{folder}/"
    )
    found = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
    return {name.removeprefix(f"{folder}/") for name in found}


async def test_images_and_ledger_are_reached_with_the_same_options(
    sandbox, server, output, tmp_path
):
    assert (await run(sandbox, rows(2), output)).stored == 2
    found = names(server, tmp_path.name)
    assert {"r0.jpg", "r1.jpg"} <= found
    assert any(name.startswith("_ledger/rows/") for name in found)
    assert (await read_ledger_status(open_ledger_store(output))).states == {State.STORED: 2}
    assert (await run(sandbox, rows(2), output)).already_stored == 2
    assert sandbox.service.bill()["accepted"] == 2


async def test_a_store_that_asks_to_slow_down_loses_nothing_and_costs_nothing(
    sandbox, proxy, output
):
    busy = {"slow_down": 0.15, "too_many": 0.05}
    proxy.rates = dict.fromkeys(("put", "get", "delete"), busy)
    summary = await run(sandbox, rows(25), output)
    assert (summary.stored, summary.failures) == (25, [])
    assert proxy.befallen["slow_down"] + proxy.befallen["too_many"] > 10
    assert sandbox.service.bill()["accepted"] == 25


async def test_one_that_refuses_is_not_asked_twice(proxy, output):
    proxy.rates = {"put": {"denied": 1.0}}
    with pytest.raises(
        StorageError, match=r"cat\.jpg cannot be written: PermissionError"
    ) as caught:
        await output.write("cat.jpg", b"a cat")
    assert proxy.numbers["put"] == 1
    assert SECRET not in repr(caught.value)
    with pytest.raises(ConfigurationError, match="cannot be written to"):
        await output.check_writable()


async def test_where_nothing_may_be_removed_a_batch_runs_all_the_same(
    sandbox, proxy, server, output, tmp_path
):
    proxy.rates = {"delete": {"denied": 1.0}}
    await output.check_writable()
    await output.check_writable()
    assert names(server, tmp_path.name) == {".probe"}
    manifest = Manifest([{"id": "a", "prompt": "oil"}, {"id": "b", "prompt": "nsfw"}])
    assert (await run(sandbox, manifest, output)).stored == 1
    again = await run(sandbox, Manifest([{"id": "a", "prompt": "oil"}]), output)
    assert (again.already_stored, again.complete) == (1, True)
    assert sandbox.service.bill()["accepted"] == 2
    assert (await read_ledger_status(open_ledger_store(output))).states == {
        State.STORED: 1,
        State.FAILED: 1,
    }


async def test_many_at_once_share_a_bounded_number_of_connections(proxy, output):
    store = open_ledger_store(output)
    await asyncio.gather(
        *(output.write_unique([f"{n}.jpg", f"{n}~1.jpg"], bytes(2**16)) for n in range(60)),
        *(store.create(f"rows/{n}.json", b"{}") for n in range(60)),
        *(store.read(f"rows/none-{n}.json") for n in range(60)),
    )
    assert proxy.numbers["put"] == 120
    # The proxy sees a moment later that one has been closed.
    assert 10 < proxy.most_connections < 2 * 48


async def test_what_is_read_costs_one_request(proxy, output):
    await output.write("cat.jpg", b"a cat")
    assert await output.read("cat.jpg") == b"a cat"
    assert await output.read("none.jpg") is None
    assert proxy.numbers == {"put": 1, "get": 2}


async def test_connections_are_as_many_as_the_options_say(proxy, tmp_path):
    few = options(proxy) | {"config_kwargs": {"max_pool_connections": 2}}
    output = OutputFolder(f"s3://pictures/{tmp_path.name}", few)
    await asyncio.gather(*(output.write(f"{n}.jpg", bytes(2**16)) for n in range(20)))
    assert proxy.most_connections <= 2 * 2


def test_the_command_line_takes_options_from_the_environment(
    sandbox, proxy, server, tmp_path, monkeypatch, capsys
):
    for name, value in {
        "API_KEY": KEY,
        "BASE_URL": sandbox.url,
        "POLL_INITIAL_DELAY": "0",
        "POLL_INTERVAL": "0.05",
        "STORAGE_OPTIONS": json.dumps(options(proxy)),
    }.items():
        monkeypatch.setenv(f"FLUX_KONTEXT_{name}", value)
    manifest = tmp_path / "m.csv"
    manifest.write_text("id,prompt\na,oil\nb,nsfw\n")
    output = f"s3://pictures/{tmp_path.name}"
    assert main(["run", str(manifest), output]) == 1
    assert main(["status", output]) == 0
    assert main(["collect", output]) == 0
    assert main(["retry-failed", output]) == 1
    assert names(server, tmp_path.name) >= {"a.jpg", "failed.csv"}
    told = capsys.readouterr()
    assert "1  stored" in told.out
    assert SECRET not in told.out + told.err


def test_without_failed_rows_there_is_nothing_to_retry(proxy, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FLUX_KONTEXT_STORAGE_OPTIONS", json.dumps(options(proxy)))
    assert main(["retry-failed", f"s3://pictures/{tmp_path.name}"]) == 2
    assert "There are no failed rows" in capsys.readouterr().err


def test_a_manifest_that_may_not_be_read_says_so(proxy, server, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(fsspec.config.conf, "s3", options(proxy))
    server.put_object(Bucket="pictures", Key=f"{tmp_path.name}/m.csv", Body=b"id,prompt\na,oil\n")
    manifest = f"s3://pictures/{tmp_path.name}/m.csv"
    proxy.rates = {"get": {"denied": 1.0}, "head": {"denied": 1.0}}
    assert main(["plan", manifest, str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert f"The manifest {manifest} may not be read" in told
    assert SECRET not in told
    proxy.rates = {}
    assert main(["plan", manifest, str(tmp_path / "out")]) == 0
