"""What a reference is, by its text alone: no filesystem is made for one that is not allowed."""

import fsspec
import pytest

from prefect_flux_kontext.references.location import (
    Kind,
    classify_location,
    find_location_problem,
    locate,
    manifest_folder,
    non_public_references,
    open_filesystem,
)


@pytest.mark.parametrize(
    ("reference", "kind"),
    [
        ("https://a.test/cat.jpg", Kind.WEB),
        ("HTTP://a.test/cat.jpg", Kind.WEB),
        ("s3://bucket/cat.jpg", Kind.PRIVATE),
        ("gs://bucket/cat.jpg", Kind.PRIVATE),
        ("abfs://container@account.dfs.core.windows.net/cat.jpg", Kind.PRIVATE),
        ("az://container/cat.jpg", Kind.PRIVATE),
        ("cat.jpg", Kind.OWN),
        ("/data/a b#1?.jpg", Kind.OWN),
        ("./12:30.jpg", Kind.OWN),
        ("12:30.jpg", Kind.OWN),
        ("file:///data/cat.jpg", Kind.OWN),
        ("memory://cat.jpg", Kind.OWN),
    ],
)
def test_the_service_gets_each_kind_in_its_way(reference, kind):
    assert classify_location(reference) is kind
    assert non_public_references([reference]) == ([] if kind is Kind.WEB else [reference])
    if kind is not Kind.WEB:
        assert find_location_problem(reference, "/data") is None


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
        "",
        " ",
    ],
)
def test_what_is_not_on_the_list_is_refused_without_a_filesystem(reference, monkeypatch):
    def made(*_args, **_how):
        raise AssertionError("a filesystem was made")

    monkeypatch.setattr(fsspec, "filesystem", made)
    monkeypatch.setattr(fsspec.core, "url_to_fs", made)
    assert "so the service cannot fetch it" in find_location_problem(reference, "/data")


@pytest.mark.parametrize(
    "reference", ["s3://bucket", "s3://bucket/", "s3:bucket/cat.jpg", "gs:///x"]
)
def test_a_bucket_is_no_object(reference):
    assert "names no object" in find_location_problem(reference, None)


@pytest.mark.parametrize(
    "reference", ["s3://key:word@bucket/x", "gs://me@bucket/x", "az://a:b@c/x"]
)
def test_a_password_in_a_bucket_is_refused_and_not_repeated(reference):
    told = find_location_problem(reference, None)
    assert "has a user name or password" in told
    assert "word@" not in told


def test_relative_paths_start_from_a_local_manifests_folder_else_from_the_working_directory(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    here = str(tmp_path)
    assert manifest_folder("m.csv") == here
    assert manifest_folder("/data/m.csv") == manifest_folder("file:///data/m.csv") == "/data"
    assert manifest_folder([{"image": "cat.jpg"}]) == manifest_folder("memory://m.csv") == here
    for url in ("https://a.test/m.csv", "s3://bucket/m.csv", "gist://1/m.csv"):
        assert manifest_folder(url) is None


def test_a_local_path_is_made_absolute_and_a_protocol_small():
    assert locate("cat.jpg", "/data") == locate("file://cat.jpg", "/data") == "/data/cat.jpg"
    assert locate("FILE:///a%20b.jpg", "/data") == "/a%20b.jpg"
    assert locate("S3://Bucket/Cat.jpg", "/data") == "s3://Bucket/Cat.jpg"
    assert locate("HTTPS://a.test/x", "/data") == "HTTPS://a.test/x"


def test_a_path_is_opened_as_it_is_whatever_is_in_it(tmp_path):
    path = str(tmp_path / "a b#1?%20.jpg")
    fs, where = open_filesystem(path)
    fs.pipe_file(where, b"x")
    assert (tmp_path / "a b#1?%20.jpg").read_bytes() == b"x"
