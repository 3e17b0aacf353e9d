"""Reports of whole batches, also after crashes."""

import asyncio
import csv
import json
import logging
from collections import Counter

import pytest

from prefect_flux_kontext.cli import main
from prefect_flux_kontext.errors import LedgerError
from prefect_flux_kontext.ledger.heartbeat import keep_heartbeat
from prefect_flux_kontext.ledger.store import RecordStore, open_ledger_store
from prefect_flux_kontext.manifest.reader import Manifest
from prefect_flux_kontext.report.results import (
    acquire_merge_lock,
    open_results_store,
    write_part,
)
from prefect_flux_kontext.report.thumbnails import image_thumbnail_name
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from prefect_flux_kontext.storage.filesystem import OutputFolder
from tests.chaos.checker import read_all
from tests.support import batches
from tests.support.galleries import line
from tests.support.s3 import s3_server

SECRET = "SIGNATURE-IN-A-URL"


@pytest.fixture(scope="module")
def sandbox():
    with running_sandbox(SandboxSettings(mean=0.05, long_edge=96)) as running:
        yield running


@pytest.fixture(params=["disk", "s3"])
def output(request, tmp_path):
    if request.param == "disk":
        yield str(tmp_path / "out")
        return
    with s3_server() as (url, _):
        yield f"{url}/{tmp_path.name}/out"


def manifest(folder, sandbox, rows):
    """A manifest of (id, prompt) with custom columns and signed references."""
    path = folder / "manifest.csv"
    reference = f"{sandbox.url}/references/cat.png"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "image", "prompt", "sku", "cost_usd", "style"])
        for number, (name, prompt) in enumerate(rows):
            image = f"{reference}?X-Amz-Signature={SECRET}&n={number}"
            writer.writerow([name, image, prompt, f"s{number}", "9.99", "oil"])
    return Manifest(str(path))


def results(output):
    return [json.loads(line) for line in read_all(output)["results.jsonl"].splitlines()]


def thumbnails_of(output):
    """The name of each thumbnail in the gallery's files, as often as it occurs."""
    for name, data in read_all(output).items():
        if name.startswith("_gallery/") and name.endswith(".js"):
            yield from json.loads(data.decode().partition(", ")[2].rpartition(")")[0])


def states(output):
    return {row["id"]: row["state"] for row in results(output)}


async def test_every_row_has_a_complete_line(sandbox, output, tmp_path):
    rows = [("a", "one"), ("b", "nsfw"), ("c/d", "three"), ("bad\x01", "four")]
    summary = await batches.run(sandbox, manifest(tmp_path, sandbox, rows), output)
    assert (summary.stored, summary.failed) == (2, 2)
    good, violation, folder, refused = results(output)
    files = read_all(output)
    assert good["bytes"] == len(files[good["file"]])
    assert good["uri"].endswith("/out/a/oil.jpg")
    assert good["uris"] == [good["uri"]]
    assert (good["sku"], good["manifest_cost_usd"], good["cost_usd"]) == ("s0", "9.99", 0.03)
    assert good["prompt"].endswith("\none")
    assert (good["style"], good["mode"]) == ("oil", "pro")
    assert (good["state"], good["attempts"], good["stored_before"]) == ("stored", 1, False)
    assert "flow_run_id" not in good
    assert good["generation_seconds"] >= 0
    assert good["waiting_seconds"] >= 0
    assert good["download_seconds"] > 0
    assert good["submitted_at"] <= good["finished_at"] <= good["recorded_at"]
    assert good["reference_images"] == [f"{sandbox.url}/references/cat.png?n=0"]
    assert violation["reason"] == "CONTENT_VIOLATION"
    assert violation["cost_usd"] == 0.03
    assert folder["id"] == "c/d"
    assert (refused["state"], refused["reason"]) == ("failed", "refused")
    assert "key" not in refused
    for name, data in files.items():
        assert SECRET.encode() not in data or name == "failed.csv", name
    assert not [name for name in files if name.startswith("_results/parts/")]
    assert b"data:image/webp" in files["gallery.html"]
    assert files["_gallery/contact-sheet.png"].startswith(b"\x89PNG")


async def test_second_run_updates_rows_without_duplicates(sandbox, output, tmp_path):
    """A second run updates its rows and leaves the rows of other runs as they are."""
    first = [("a", "one"), ("b", "nsfw b"), ("c", "three")]
    await batches.run(sandbox, manifest(tmp_path, sandbox, first), output)
    before = {row["id"]: row for row in results(output)}
    await batches.run(sandbox, manifest(tmp_path, sandbox, [*first[:2], ("d", "four")]), output)
    after = {row["id"]: row for row in results(output)}
    assert len(results(output)) == 4
    assert {name: row["state"] for name, row in after.items()} == {
        "a": "stored",
        "b": "failed",
        "c": "stored",
        "d": "stored",
    }
    assert (after["a"], after["c"]) == (before["a"], before["c"])
    thumbnails = Counter(thumbnails_of(output))
    assert [thumbnails[image_thumbnail_name(after[name]["key"])] for name in ("a", "c", "d")] == [
        1,
        1,
        1,
    ]


async def test_part_files_exist_while_the_batch_runs(sandbox, tmp_path):
    output = str(tmp_path / "out")
    seen = []
    put = OutputFolder.put

    async def spy(self, name, source):
        if name.startswith("results."):
            seen.append([name for name in read_all(output) if name.startswith("_results/parts/")])
        return await put(self, name, source)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(OutputFolder, "put", spy)
        await batches.run(sandbox, manifest(tmp_path, sandbox, [("a", "one")]), output)
    assert [len(parts) for parts in seen] == [1, 1]
    assert seen[0][0].endswith("-000001.jsonl")


async def test_parts_of_dead_runs_are_merged_and_of_live_runs_kept(sandbox, tmp_path):
    """The next run merges the part files of a killed run, not those of a live run."""
    output = str(tmp_path / "out")
    store, ledger = (
        open_results_store(OutputFolder(output)),
        open_ledger_store(OutputFolder(output)),
    )
    await write_part(store, "dead", 1, [line(7, run="dead", file=None)])
    async with keep_heartbeat(ledger) as heartbeat:
        other = heartbeat.owner
        await write_part(store, other, 1, [line(8, run=other)])
        await batches.run(sandbox, manifest(tmp_path, sandbox, [("a", "one")]), output)
        assert states(output) == {"row-7": "stored", "a": "stored"}
        assert await store.list_names("parts") == [f"{other}-000001.jsonl"]
    await batches.run(sandbox, manifest(tmp_path, sandbox, [("a", "one")]), output)
    assert set(states(output)) == {"row-7", "row-8", "a"}
    assert await store.list_names("parts") == []


async def test_merge_is_idempotent_after_a_crash(sandbox, tmp_path, monkeypatch):
    """A run that crashes between its files is merged again, to the same lines."""
    output = str(tmp_path / "out")

    async def crash(*_):
        raise LedgerError("crashed here")

    with monkeypatch.context() as patched:
        patched.setattr("prefect_flux_kontext.report.builder.remove_parts", crash)
        await batches.run(sandbox, manifest(tmp_path, sandbox, [("a", "one")]), output)
    first = results(output)
    assert await open_results_store(OutputFolder(output)).list_names("parts")
    await batches.run(sandbox, manifest(tmp_path, sandbox, [("b", "two")]), output)
    assert results(output)[0] == first[0]
    assert [row["id"] for row in results(output)] == ["a", "b"]
    assert not await open_results_store(OutputFolder(output)).list_names("parts")


async def test_failed_report_is_logged_and_fails_no_row(sandbox, tmp_path, monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError("no report today")

    for name in ("write_part", "update_report"):
        monkeypatch.setattr(f"prefect_flux_kontext.report.builder.{name}", fail)
    with caplog.at_level(logging.WARNING):
        summary = await batches.run(
            sandbox, manifest(tmp_path, sandbox, [("a", "one")]), tmp_path / "out"
        )
    assert summary.complete
    assert "Wave 1 is not in the report: no report today" in caplog.text
    assert (
        "The report is not up to date: no report today. To rebuild it: flux-kontext gallery"
        in caplog.text
    )


@pytest.mark.virtual_time
async def test_merge_lock_has_one_holder_and_survives_dead_runs():
    """Only one run merges at a time, and a dead holder does not block the others."""
    ledger, store = RecordStore("memory://locks/_ledger"), RecordStore("memory://locks/_results")
    await store.create("locks/000001.acquired", b"dead")
    inside, most, order = 0, 0, []

    async def merge(number):
        nonlocal inside, most
        async with keep_heartbeat(ledger) as beat, acquire_merge_lock(store, ledger, beat.owner):
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(3)
            inside -= 1
            order.append(number)

    await asyncio.gather(*map(merge, range(5)))
    assert (most, sorted(order)) == (1, list(range(5)))
    assert await store.list_names("locks") == ["000006.acquired", "000006.released"]


def test_gallery_command_rebuilds_the_gallery(sandbox, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"
    rows = manifest(tmp_path, sandbox, [("a", "one"), ("b", "two")])
    monkeypatch.setenv("FLUX_KONTEXT_GALLERY_IMAGES", "0")
    asyncio.run(batches.run(sandbox, rows, output))
    assert not (output / "gallery.html").exists()
    assert not (output / "_gallery").exists()
    assert len(results(str(output))) == 2
    assert main(["gallery", str(output)]) == 2
    assert "FLUX_KONTEXT_GALLERY_IMAGES is 0" in capsys.readouterr().err
    monkeypatch.delenv("FLUX_KONTEXT_GALLERY_IMAGES")
    assert main(["gallery", str(output)]) == 0
    assert capsys.readouterr().out == f"2 rows\n{(output / 'gallery.html').as_uri()}\n"
    assert (output / "gallery.html").read_text().count("data:image/webp") == 2


def test_gallery_command_fails_without_results(tmp_path, capsys):
    assert main(["gallery", str(tmp_path)]) == 2
    assert "No run has written results" in capsys.readouterr().err


pytestmark = pytest.mark.anyio
