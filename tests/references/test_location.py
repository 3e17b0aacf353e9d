"""Kinds of references; no filesystem is created for a refused one."""

import fsspec
import pytest

from prefect_flux_kontext.references.location import (
    LocationKind,
    classify_location,
    find_location_problem,
    find_manifest_folder,
    non_public_references,
    normalize_reference,
    open_filesystem,
)


@pytest.mark.parametrize(
    ("reference", "kind"),
    [
        ("https://a.test/cat.jpg", LocationKind.WEB),
        ("HTTP://a.test/cat.jpg", LocationKind.WEB),
        ("s3://bucket/cat.jpg", LocationKind.PRIVATE),
        ("gs://bucket/cat.jpg", LocationKind.PRIVATE),
        ("abfs://container@account.dfs.core.windows.net/cat.jpg", LocationKind.PRIVATE),
        ("az://container/cat.jpg", LocationKind.PRIVATE),
        ("cat.jpg", LocationKind.LOCAL),
        ("/data/a b#1?.jpg", LocationKind.LOCAL),
        ("./12:30.jpg", LocationKind.LOCAL),
        ("12:30.jpg", LocationKind.LOCAL),
        ("file:///data/cat.jpg", LocationKind.LOCAL),
        ("memory://cat.jpg", LocationKind.LOCAL),
    ],
)
def test_classify_location_knows_every_supported_kind(reference, kind):
    assert classify_location(reference) is kind
    assert non_public_references([reference]) == ([] if kind is LocationKind.WEB else [reference])
    if kind is not LocationKind.WEB:
        assert find_location_problem(reference) is None


@pytest.mark.parametrize(
    "reference",
    [
        "ftp://a.test/cat.jpg",
        "sftp://a.test/cat.jpg",
        "gist://1/cat.jpg",
        "github://a:b@c/cat.jpg",
        "hf://datasets/a/cat.jpg",
        "data:image/png;base64,AAAA",
        "zip://cat.jpg::s3://bucket/a.zip",
        "simplecache::s3://bucket/cat.jpg",
        "s3://bucket/a::b",
        "//a.test/cat.jpg",
        "C:\\cat.jpg",
        "nobody-knows://cat.jpg",
        "arrow_hdfs://host/cat.jpg",
        "7zip://cat.jpg",
        "",
        " ",
    ],
)
def test_unsupported_location_is_refused_by_its_text(reference, monkeypatch):
    def fail(*_args, **_how):
        raise AssertionError("a filesystem was created")

    monkeypatch.setattr(fsspec, "filesystem", fail)
    monkeypatch.setattr(fsspec.core, "url_to_fs", fail)
    assert "so the service cannot fetch it" in find_location_problem(reference)


@pytest.mark.parametrize("key", ["#root.jpg", "?v=1.jpg", "a/#b/c.jpg", "[a.jpg", "a//b.jpg", "%"])
def test_key_of_an_object_may_hold_any_character(key):
    assert find_location_problem(f"s3://bucket/{key}") is None


@pytest.mark.parametrize(
    "reference",
    [
        "s3://bucket",
        "s3://bucket/",
        "s3:///#root.jpg",
        "s3://bucket//",
        "s3:bucket/cat.jpg",
        "gs:///x",
    ],
)
def test_bucket_without_object_is_refused(reference):
    assert "does not name an object" in find_location_problem(reference)


@pytest.mark.parametrize(
    "reference", ["s3://key:word@bucket/x", "gs://me@bucket/x", "az://a:b@c/x"]
)
def test_password_in_bucket_url_is_refused_and_not_shown(reference):
    message = find_location_problem(reference)
    assert "has a user name or password" in message
    assert "word@" not in message


def test_manifest_folder_is_none_for_remote_manifests(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = str(tmp_path)
    assert find_manifest_folder("m.csv") == here
    assert (
        find_manifest_folder("/data/m.csv")
        == find_manifest_folder("file:///data/m.csv")
        == "/data"
    )
    assert (
        find_manifest_folder([{"image": "cat.jpg"}])
        == find_manifest_folder("memory://m.csv")
        == here
    )
    for url in ("https://a.test/m.csv", "s3://bucket/m.csv", "gist://1/m.csv"):
        assert find_manifest_folder(url) is None


def test_locate_normalizes_paths_and_protocols():
    assert (
        normalize_reference("cat.jpg", "/data")
        == normalize_reference("file://cat.jpg", "/data")
        == "/data/cat.jpg"
    )
    assert normalize_reference("FILE:///a%20b.jpg", "/data") == "/a%20b.jpg"
    assert normalize_reference("S3://Bucket/Cat.jpg", "/data") == "s3://Bucket/Cat.jpg"
    assert normalize_reference("HTTPS://a.test/x", "/data") == "HTTPS://a.test/x"


def test_open_filesystem_does_not_decode_paths(tmp_path):
    path = str(tmp_path / "a b#1?%20.jpg")
    fs, where = open_filesystem(path)
    fs.pipe_file(where, b"x")
    assert (tmp_path / "a b#1?%20.jpg").read_bytes() == b"x"
