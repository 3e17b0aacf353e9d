"""What a reference is, by its text alone: no filesystem is made for one that is not allowed."""

import fsspec
import pytest

from prefect_flux_kontext.references.location import (
    Kind,
    folder_of,
    kind_of,
    located,
    non_public_references,
    opened,
    problem_of_kind,
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
    assert kind_of(reference) is kind
    assert non_public_references([reference]) == ([] if kind is Kind.WEB else [reference])
    if kind is not Kind.WEB:
        assert problem_of_kind(reference, "/data") is None


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
    assert "so the service cannot fetch it" in problem_of_kind(reference, "/data")


@pytest.mark.parametrize(
    "reference", ["s3://bucket", "s3://bucket/", "s3:bucket/cat.jpg", "gs:///x"]
)
def test_a_bucket_is_no_object(reference):
    assert "names no object" in problem_of_kind(reference, None)


@pytest.mark.parametrize(
    "reference", ["s3://key:word@bucket/x", "gs://me@bucket/x", "az://a:b@c/x"]
)
def test_a_password_in_a_bucket_is_refused_and_not_repeated(reference):
    told = problem_of_kind(reference, None)
    assert "has a user name or password" in told
    assert "word@" not in told


def test_relative_paths_start_from_a_local_manifests_folder_else_from_the_working_directory(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    here = str(tmp_path)
    assert folder_of("m.csv") == here
    assert folder_of("/data/m.csv") == folder_of("file:///data/m.csv") == "/data"
    assert folder_of([{"image": "cat.jpg"}]) == folder_of("memory://m.csv") == here
    for url in ("https://a.test/m.csv", "s3://bucket/m.csv", "gist://1/m.csv"):
        assert folder_of(url) is None


def test_a_local_path_is_made_absolute_and_a_protocol_small():
    assert located("cat.jpg", "/data") == located("file://cat.jpg", "/data") == "/data/cat.jpg"
    assert located("FILE:///a%20b.jpg", "/data") == "/a%20b.jpg"
    assert located("S3://Bucket/Cat.jpg", "/data") == "s3://Bucket/Cat.jpg"
    assert located("HTTPS://a.test/x", "/data") == "HTTPS://a.test/x"


def test_a_path_is_opened_as_it_is_whatever_is_in_it(tmp_path):
    path = str(tmp_path / "a b#1?%20.jpg")
    fs, where = opened(path)
    fs.pipe_file(where, b"x")
    assert (tmp_path / "a b#1?%20.jpg").read_bytes() == b"x"
