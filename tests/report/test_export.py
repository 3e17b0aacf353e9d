"""Copies of an output: as files, and as shards that other tools read."""

import asyncio
import csv
import io
import json
import tarfile

import pytest
from PIL import Image

from prefect_flux_kontext.cli import main
from prefect_flux_kontext.report.verdicts import Verdict, Verdicts
from prefect_flux_kontext.sandbox.settings import PHOTOS
from prefect_flux_kontext.storage.filesystem import OutputFolder
from tests.cli.conftest import sandbox  # noqa: F401
from tests.support.s3 import s3_server


@pytest.fixture
def output(sandbox, tmp_path):  # noqa: F811
    """Three stored rows and a failed one: a web reference, a local one, and none."""
    with (tmp_path / "m.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [
                ["id", "image", "prompt", "sku"],
                ["web", f"{sandbox.url}/references/cat.png", "As a woodcut", "=1+1"],
                ["own", PHOTOS / "coffee.webp", "As a <b>poster</b>", "2"],
                ["none", "", "A cat", "3"],
                ["bad", "", "A nsfw cat", "4"],
            ]
        )
    run = ["run", str(tmp_path / "m.csv"), str(tmp_path / "out")]
    assert main(run) == 1
    lines = [json.loads(row) for row in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    verdict = Verdict(key=lines[1]["key"], verdict="keep")
    asyncio.run(Verdicts(OutputFolder(str(tmp_path / "out"))).record([verdict]))
    return tmp_path / "out"


@pytest.fixture(params=["disk", "s3"])
def target(request, tmp_path):
    if request.param == "disk":
        yield OutputFolder(str(tmp_path / "target"))
        return
    with s3_server() as (url, _):
        yield OutputFolder(f"{url}/{tmp_path.name}/target")


def names(folder):
    return sorted(
        path.removeprefix(folder.root).lstrip("/") for path in folder.fs.find(folder.root)
    )


def test_kept_images_are_copied_with_their_lines(output, target, capsys):
    assert main(["export", str(output), str(target), "--kept"]) == 0
    assert "1 images copied to" in capsys.readouterr().out
    assert names(target) == ["own.jpg", "results.jsonl"]
    assert target.fs.cat(f"{target.root}/own.jpg") == (output / "own.jpg").read_bytes()
    (line,) = map(json.loads, target.fs.cat(f"{target.root}/results.jsonl").splitlines())
    assert (line["id"], line["verdict"], line["sku"]) == ("own", "keep", "2")


def test_webdataset_has_before_after_and_description(output, target, capsys):
    assert main(["export", str(output), str(target), "--format", "webdataset", "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert (counts["rows"], counts["shards"], counts["without_before"]) == (3, 1, 0)
    with tarfile.open(fileobj=io.BytesIO(target.fs.cat(f"{target.root}/shard-000000.tar"))) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}
    assert sorted(files) == [
        "000000001.after.jpg",
        "000000001.before.png",
        "000000001.json",
        "000000002.after.jpg",
        "000000002.before.webp",
        "000000002.json",
        "000000003.after.jpg",
        "000000003.json",
    ]
    assert files["000000002.before.webp"] == (PHOTOS / "coffee.webp").read_bytes()
    described = json.loads(files["000000002.json"])
    assert described["prompt"] == "As a <b>poster</b>"
    assert (described["verdict"], described["variant_number"]) == ("keep", 1)


def test_parquet_holds_images_and_names_them_as_such(output, target):
    parquet = pytest.importorskip("pyarrow.parquet")
    assert main(["export", str(output), str(target), "--format", "parquet"]) == 0
    data = io.BytesIO(target.fs.cat(f"{target.root}/shard-000000.parquet"))
    table = parquet.read_table(data)
    assert table.column("id").to_pylist() == ["web", "own", "none"]
    assert table.column("verdict").to_pylist() == [None, "keep", None]
    before = table.column("before").to_pylist()
    assert [image and image["path"] for image in before] == [
        "000000001.before.png",
        "000000002.before.webp",
        None,
    ]
    with Image.open(io.BytesIO(table.column("after")[0].as_py()["bytes"])) as image:
        assert image.format == "JPEG"
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["after"] == {"_type": "Image"}
    assert set(features) == set(table.column_names)


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_shards_have_a_size_and_replace_a_larger_export(output, target, monkeypatch, kind):
    monkeypatch.setattr("prefect_flux_kontext.cli.commands.parse_count", int)
    export = ["export", str(output), str(target), "--format", kind, "--shard-mb"]
    assert main([*export, "0"]) == 0
    assert len(names(target)) == 3
    assert main([*export, "1"]) == 0
    assert len(names(target)) == 1


def test_planted_reference_is_not_read(output, tmp_path, capsys):
    """The result manifest names what others wrote; the ledger has the row's own reference."""
    results = (output / "results.jsonl").read_text()
    other = str(PHOTOS / "rocket.jpg")
    (output / "results.jsonl").write_text(results.replace(str(PHOTOS / "coffee.webp"), other))
    target = tmp_path / "target"
    assert main(["export", str(output), str(target), "--format", "webdataset"]) == 0
    assert "1 without their reference" in capsys.readouterr().out


def test_reference_that_is_no_image_is_left_out(output, sandbox, tmp_path, capsys):  # noqa: F811
    """A host may answer with a page long after the row was paid."""
    results = (output / "results.jsonl").read_text()
    page = results.replace(f"{sandbox.url}/references/cat.png", f"{sandbox.url}/sandbox/bill")
    (output / "results.jsonl").write_text(page)
    assert main(["export", str(output), str(tmp_path / "to"), "--format", "webdataset"]) == 0
    assert "1 without their reference" in capsys.readouterr().out


def test_missing_images_are_counted(output, tmp_path, capsys):
    (output / "own.jpg").unlink()
    assert main(["export", str(output), str(tmp_path / "target")]) == 1
    assert "1 stored images are missing" in capsys.readouterr().out


def test_export_onto_itself_or_of_nothing_is_refused(output, tmp_path, capsys):
    before = (output / "results.jsonl").read_bytes()
    assert main(["export", str(output), f"{output}/"]) == 2
    assert (output / "results.jsonl").read_bytes() == before
    assert main(["export", str(tmp_path / "empty"), str(tmp_path / "target")]) == 2
    assert "There are no results" in capsys.readouterr().err
