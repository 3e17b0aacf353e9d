"""Batches on S3: storage options, busy stores, and stores without delete permission."""

import asyncio
import json
import logging

import fsspec
import fsspec.config
import pytest

from prefect_flux_kontext.batch.status import read_ledger_status
from prefect_flux_kontext.cli import main
from prefect_flux_kontext.errors import ConfigurationError, LedgerError, StorageError
from prefect_flux_kontext.ledger.probe import probe_store
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
    """An S3 server that only its endpoint URL leads to."""
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


async def test_images_and_ledger_use_the_same_options(sandbox, server, output, tmp_path):
    assert (await run(sandbox, rows(2), output)).stored == 2
    found = names(server, tmp_path.name)
    assert {"r0.jpg", "r1.jpg"} <= found
    assert any(name.startswith("_ledger/rows/") for name in found)
    assert (await read_ledger_status(open_ledger_store(output))).states == {State.STORED: 2}
    assert (await run(sandbox, rows(2), output)).already_stored == 2
    assert sandbox.service.bill()["accepted"] == 2


async def test_slow_down_errors_lose_no_image(sandbox, proxy, output):
    """A store that answers 503 SlowDown loses no image and causes no second payment."""
    busy = {"slow_down": 0.15, "too_many": 0.05}
    proxy.rates = dict.fromkeys(("put", "get", "delete"), busy)
    summary = await run(sandbox, rows(25), output)
    assert (summary.stored, summary.failures) == (25, [])
    assert proxy.applied["slow_down"] + proxy.applied["too_many"] > 10
    assert sandbox.service.bill()["accepted"] == 25


async def test_conflicts_lose_no_image(sandbox, proxy, output):
    proxy.rates = {"put": {"conflict": 0.3}}
    summary = await run(sandbox, rows(10), output)
    assert (summary.stored, summary.failures) == (10, [])
    assert proxy.applied["conflict"] > 5
    assert sandbox.service.bill()["accepted"] == 10


@pytest.mark.parametrize(
    ("fault", "missing"),
    [
        ({"rates": {"put": {"not_implemented": 1.0}}}, "create a record (on S3: PutObject with"),
        ({"rates": {"put": {"denied": 1.0}}}, "create a record (on S3: PutObject with"),
        ({"rates": {"get": {"denied": 1.0}}}, "read a record back (on S3: s3:GetObject)"),
        ({"drops": (b"if-none-match:",)}, "refuse to create a record twice (on S3: If-None-"),
        ({"hides_missing": True}, "tell that a record is missing (on S3: s3:ListBucket)"),
    ],
)
async def test_store_that_cannot_hold_a_ledger_is_refused_unpaid(
    sandbox, proxy, output, fault, missing
):
    for name, value in fault.items():
        setattr(proxy, name, value)
    with pytest.raises(ConfigurationError) as caught:
        await run(sandbox, rows(3), output)
    assert f"so nothing was paid: the store has to {missing}" in str(caught.value)
    assert SECRET not in repr(caught.value)
    assert sandbox.service.bill()["accepted"] == 0


async def test_refused_read_names_the_permission_to_list(proxy, output):
    proxy.hides_missing = True
    with pytest.raises(LedgerError, match=r"PermissionError: .*permission to list \(on S3: s3:Li"):
        await open_ledger_store(output).read("waves/none.jsonl")


async def test_store_is_probed_once_a_process(proxy, output):
    store = open_ledger_store(output)
    await probe_store(store)
    requests = proxy.numbers.total()
    await probe_store(open_ledger_store(output))
    assert proxy.numbers.total() == requests
    assert await store.list_names("probe") == []


async def test_access_denied_is_not_retried(proxy, output):
    proxy.rates = {"put": {"denied": 1.0}}
    with pytest.raises(
        StorageError, match=r"cat\.jpg cannot be written: PermissionError"
    ) as caught:
        await output.write("cat.jpg", b"a cat")
    assert proxy.numbers["put"] == 1
    assert SECRET not in repr(caught.value)
    with pytest.raises(ConfigurationError, match="cannot be written to"):
        await output.check_writable()


async def test_batch_runs_without_delete_permission(
    sandbox, proxy, server, output, tmp_path, caplog
):
    caplog.set_level(logging.WARNING, "prefect_flux_kontext")
    proxy.rates = {"delete": {"denied": 1.0}}
    await output.check_writable()
    await output.check_writable()
    assert names(server, tmp_path.name) == {".probe"}
    manifest = Manifest([{"id": "a", "prompt": "oil"}, {"id": "b", "prompt": "nsfw"}])
    assert (await run(sandbox, manifest, output)).stored == 1
    again = await run(sandbox, Manifest([{"id": "a", "prompt": "oil"}]), output)
    assert (again.already_stored, again.complete) == (1, True)
    # The report is complete: a missing permission to remove files is no warning either.
    assert caplog.messages == []
    assert names(server, tmp_path.name) >= {"results.jsonl", "results.parquet", "gallery.html"}
    assert b"b,nsfw,2,CONTENT_VIOLATION" in await output.read("failed.csv")
    assert sandbox.service.bill()["accepted"] == 2
    assert (await read_ledger_status(open_ledger_store(output))).states == {
        State.STORED: 1,
        State.FAILED: 1,
    }


async def test_concurrent_calls_share_bounded_connections(proxy, output):
    store = open_ledger_store(output)
    await asyncio.gather(
        *(output.write_unique([f"{n}.jpg", f"{n}~1.jpg"], bytes(2**16)) for n in range(60)),
        *(store.create(f"rows/{n}.json", b"{}") for n in range(60)),
        *(store.read(f"rows/none-{n}.json") for n in range(60)),
    )
    assert proxy.numbers["put"] == 120
    # The proxy notices a closed connection a moment later.
    assert 10 < proxy.most_connections < 2 * 48


async def test_read_takes_one_request(proxy, output):
    await output.write("cat.jpg", b"a cat")
    assert await output.read("cat.jpg") == b"a cat"
    assert await output.read("none.jpg") is None
    assert proxy.numbers == {"put": 1, "get": 2}


async def test_options_limit_the_connections(proxy, tmp_path):
    few = options(proxy) | {"config_kwargs": {"max_pool_connections": 2}}
    output = OutputFolder(f"s3://pictures/{tmp_path.name}", few)
    await asyncio.gather(*(output.write(f"{n}.jpg", bytes(2**16)) for n in range(20)))
    assert proxy.most_connections <= 2 * 2


def test_command_line_takes_options_from_the_environment(
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
    captured = capsys.readouterr()
    assert "1  stored" in captured.out
    assert "was not checked: add --verify" in captured.out
    assert SECRET not in captured.out + captured.err
    assert main(["status", output, "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["missing_images"] == 0
    server.delete_object(Bucket="pictures", Key=f"{tmp_path.name}/a.jpg")
    assert main(["status", output, "--verify"]) == 0
    assert "1  stored row has no image" in capsys.readouterr().out


def test_command_line_ends_with_2_if_the_store_excludes_nobody(
    sandbox, proxy, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("FLUX_KONTEXT_API_KEY", KEY)
    monkeypatch.setenv("FLUX_KONTEXT_BASE_URL", f"{sandbox.url}/api/v1")
    monkeypatch.setenv("FLUX_KONTEXT_STORAGE_OPTIONS", json.dumps(options(proxy)))
    manifest = tmp_path / "m.csv"
    manifest.write_text("id,prompt\na,oil\n")
    proxy.drops = (b"if-none-match:",)
    assert main(["run", str(manifest), f"s3://pictures/{tmp_path.name}"]) == 2
    assert "cannot hold a ledger, so nothing was paid" in capsys.readouterr().err
    assert sandbox.service.bill()["accepted"] == 0


def test_retry_failed_needs_failed_rows(proxy, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FLUX_KONTEXT_STORAGE_OPTIONS", json.dumps(options(proxy)))
    assert main(["retry-failed", f"s3://pictures/{tmp_path.name}"]) == 2
    assert "There are no failed rows" in capsys.readouterr().err


def test_manifest_without_read_access_is_an_error(proxy, server, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(fsspec.config.conf, "s3", options(proxy))
    server.put_object(Bucket="pictures", Key=f"{tmp_path.name}/m.csv", Body=b"id,prompt\na,oil\n")
    manifest = f"s3://pictures/{tmp_path.name}/m.csv"
    proxy.rates = {"get": {"denied": 1.0}, "head": {"denied": 1.0}}
    assert main(["plan", manifest, str(tmp_path / "out")]) == 2
    output = capsys.readouterr().err
    assert f"No permission to read the manifest {manifest}" in output
    assert SECRET not in output
    proxy.rates = {}
    assert main(["plan", manifest, str(tmp_path / "out")]) == 0
