"""Rights follow the origin of a row, also by way of the manifest of failed rows."""

import csv
import json

import pytest

from prefect_flux_kontext.cli import main
from prefect_flux_kontext.manifest.reader import Manifest
from prefect_flux_kontext.manifest.row import RefusedRow, Row
from prefect_flux_kontext.references.rights import (
    find_retry_rights,
    find_rights,
    find_rights_problem,
)
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from tests.support.pictures import picture
from tests.support.served_folder import served_folder


def is_allowed(source, reference, **options):
    return find_rights_problem(reference, find_rights(source, **options)) is None


@pytest.mark.parametrize(
    ("source", "reference", "expected"),
    [
        ("/data/m.csv", "cat.jpg", True),
        ("/data/m.csv", "/etc/cat.jpg", True),
        ("/data/m.csv", "s3://other/cat.jpg", True),
        ([{}], "/etc/cat.jpg", True),
        ("memory://m.csv", "cat.jpg", True),
        ("https://a.test/m.csv", "https://b.test/cat.jpg", True),
        ("https://a.test/m.csv", "cat.jpg", False),
        ("https://a.test/m.csv", "s3://any/cat.jpg", False),
        ("s3://own/in/m.csv", "s3://own/cat.jpg", True),
        ("s3://own/in/m.csv", "s3a://own/cat.jpg", True),
        ("s3a://own/in/m.csv", "S3://own/cat.jpg", True),
        ("s3://own/in/m.csv", "s3://own-not/cat.jpg", False),
        ("s3://own/in/m.csv", "gs://own/cat.jpg", False),
        ("s3://own/in/m.csv", "s3://own/../other/cat.jpg", False),
        ("s3://own/in/m.csv", "file:///etc/cat.jpg", False),
        ("s3://own/in/m.csv", "memory://cat.jpg", False),
        ("az://c@acc/m.csv", "abfs://c@acc/cat.jpg", True),
        ("gist://1/m.csv", "s3://any/cat.jpg", False),
        ("arrow_hdfs://host/m.csv", "/etc/cat.jpg", False),
    ],
)
def test_default_rights_follow_the_manifest(source, reference, expected):
    assert is_allowed(source, reference) is expected


@pytest.mark.parametrize(
    ("source", "reference", "expected"),
    [
        ("/other/m.csv", "{tmp}/in/cat.jpg", True),
        ("/other/m.csv", "{tmp}/in/../cat.jpg", False),
        ("/other/m.csv", "{tmp}/in-not/cat.jpg", False),
        ("/other/m.csv", "{tmp}/in/out/cat.jpg", False),  # a link
        ("/other/m.csv", "file://{tmp}/in/cat.jpg", True),
        ("/other/m.csv", "s3://b/pre/cat.jpg", True),
        ("/other/m.csv", "s3://b/prefix/cat.jpg", False),
        ("/other/m.csv", "s3://b/pre/../cat.jpg", False),
        ("/other/m.csv", "https://a.test/cat.jpg", True),
        ("s3://own/m.csv", "s3://own/cat.jpg", False),
        ("s3://own/m.csv", "s3://b/pre/cat.jpg", True),
        ("s3://own/m.csv", "{tmp}/in/cat.jpg", False),
    ],
)
def test_roots_replace_the_defaults(source, reference, expected, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "out").symlink_to(tmp_path)
    roots = json.dumps([f"{tmp_path}/in/", "s3://b/pre"])
    monkeypatch.setenv("FLUX_KONTEXT_REFERENCE_ROOTS", roots)
    assert is_allowed(source, reference.format(tmp=tmp_path)) is expected
    # What the ledger knows does not exceed the setting either.
    rights = find_retry_rights("s3://own/out", [reference.format(tmp=tmp_path)])
    if not expected and not reference.startswith("{tmp}/in/cat"):
        assert find_rights_problem(reference.format(tmp=tmp_path), rights)


def test_folder_of_images_gives_nothing_outside_it(tmp_path, monkeypatch):
    folder, outside = tmp_path / "in", tmp_path / "private"
    folder.mkdir()
    outside.mkdir()
    for path in (folder / "own.jpg", outside / "secret.jpg"):
        path.write_bytes(picture())
    (folder / "link.jpg").symlink_to(outside / "secret.jpg")
    (folder / "inside.jpg").symlink_to(folder / "own.jpg")
    for source in (str(folder), f"{folder}/", f"{folder}/*.jpg", f"file://{folder}"):
        rows = {row.id: row for row in Manifest(source, "oil").rows()}
        assert isinstance(rows["own"], Row)
        assert isinstance(rows["inside"], Row)
        assert isinstance(rows["link"], RefusedRow)
        assert "FLUX_KONTEXT_REFERENCE_ROOTS" in rows["link"].reason
    monkeypatch.setenv("FLUX_KONTEXT_REFERENCE_ROOTS", json.dumps([str(tmp_path)]))
    assert all(isinstance(row, Row) for row in Manifest(str(folder), "oil").rows())


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A sandbox with a staging place, and a private picture of this machine."""
    (tmp_path / "private.jpg").write_bytes(picture())
    staged = tmp_path / "staged"
    staged.mkdir()
    with (
        running_sandbox(SandboxSettings(mean=0.1, long_edge=64, api_key="key")) as sandbox,
        served_folder(staged) as url,
    ):
        for name, value in {
            "API_KEY": "key",
            "BASE_URL": sandbox.url,
            "POLL_INITIAL_DELAY": "0",
            "POLL_INTERVAL": "0.05",
            "STAGING_URL": str(staged),
            "STAGING_PUBLIC_URL": url,
        }.items():
            monkeypatch.setenv(f"FLUX_KONTEXT_{name}", value)
        yield sandbox


def write_rows(path, *rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("id", "image", "prompt", "style"), *rows])


def read_failed(output):
    with (output / "failed.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_refused_local_file_gains_no_rights_by_retrying(place, tmp_path, capsys):
    """A remote manifest names a local file; neither way to run the failed rows reads it."""
    private, output, web = tmp_path / "private.jpg", tmp_path / "out", tmp_path / "web"
    web.mkdir()
    write_rows(
        web / "m.csv",
        ("a", str(private), "oil", ""),
        ("b", f"file://{private}", "oil", "no such style"),
        ("c", "", "fine", ""),
    )
    with served_folder(web) as url:
        assert main(["run", f"{url}/m.csv", str(output), "--skip-invalid"]) == 1
    assert {row["id"]: row.get("image", "") for row in read_failed(output)} == {
        "a": "",
        "b": "",
    }
    for command in (
        ["retry-failed", str(output), "--prompt", "oil"],
        ["run", str(output / "failed.csv"), str(output), "--prompt", "oil", "--skip-invalid"],
    ):
        main(command)
        assert place.service.bill()["accepted"] == 1
    assert list((tmp_path / "staged").iterdir()) == []
    assert (output / "failed.csv").stat().st_mode & 0o077 == 0


def test_planted_failed_rows_have_a_remote_manifests_rights(place, tmp_path, capsys):
    private, output = tmp_path / "private.jpg", tmp_path / "out"
    output.mkdir()
    write_rows(output / "failed.csv", ("a", str(private), "oil", ""))
    main(["retry-failed", str(output)])
    assert "is a local file, and the manifest is not" in capsys.readouterr().out
    assert place.service.bill()["accepted"] == 0


def test_failed_row_keeps_the_rights_of_its_run(place, tmp_path):
    """A person changes the prompt of a failed row, or restores its file, and retries."""
    manifest, output = tmp_path / "m.csv", tmp_path / "out"
    write_rows(manifest, ("a", "private.jpg", "nsfw", ""), ("b", "later.jpg", "oil", ""))
    assert main(["run", str(manifest), str(output), "--skip-invalid"]) == 1
    rows = {row["id"]: row for row in read_failed(output)}
    assert rows["b"]["image"] == str(tmp_path / "later.jpg")
    (tmp_path / "later.jpg").write_bytes(picture())
    write_rows(
        output / "failed.csv",
        ("a", rows["a"]["image"], "ink", ""),
        ("b", rows["b"]["image"], "oil", ""),
    )
    assert main(["retry-failed", str(output)]) == 0
    assert (output / "a.jpg").exists()
    assert (output / "b.jpg").exists()
