"""Files are put where the service can fetch them: once, under the name of their content."""

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from prefect_flux_kontext.errors import ConfigurationError, ReferenceImageError, StorageError
from prefect_flux_kontext.references import staging as module
from prefect_flux_kontext.references.staging import (
    Staging,
    create_staging,
    sign_url,
    signature_lifetime,
)
from tests.support.s3 import s3_server

PUBLIC = "https://pictures.test/staged/"


@pytest.fixture
def writes(monkeypatch):
    """Where something was really written."""
    seen = []
    create = module.create_file

    def counted(fs, path, data):
        seen.append(path)
        create(fs, path, data)

    monkeypatch.setattr(module, "create_file", counted)
    return seen


def test_a_file_has_the_name_of_its_content_and_the_place_a_public_url(tmp_path):
    staging = Staging(str(tmp_path / "new"), PUBLIC)
    name = staging.put(b"a cat", "webp")
    assert name == f"{hashlib.sha256(b'a cat').hexdigest()}.webp"
    assert (tmp_path / "new" / name).read_bytes() == b"a cat"
    assert staging.url_of(name, 60) == f"https://pictures.test/staged/{name}"


def test_equal_content_is_put_there_once_by_however_many(tmp_path, writes):
    staging = Staging(str(tmp_path), PUBLIC)
    together = threading.Barrier(8)

    def put(_number):
        together.wait()
        return staging.put(b"a cat", "png")

    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(put, range(8)))) == 1
    Staging(str(tmp_path), PUBLIC).put(b"a cat", "png")
    assert len(writes) == 1


@pytest.mark.parametrize("doubted", [False, True])
def test_half_a_file_from_elsewhere_is_written_anew(tmp_path, doubted):
    staging = Staging(str(tmp_path), PUBLIC)
    (tmp_path / staging.put(b"a cat", "png")).write_bytes(b"a c")
    name = staging.put(b"a cat", "png", doubted=doubted)
    assert (tmp_path / name).read_bytes() == b"a cat"


def test_in_doubt_the_content_is_compared_and_not_only_its_length(tmp_path):
    staging = Staging(str(tmp_path), PUBLIC)
    (tmp_path / staging.put(b"a cat", "png")).write_bytes(b"a dog")
    staging.put(b"a cat", "png", doubted=True)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"a cat"]


def test_a_place_that_refuses_is_told_as_what_may_pass(tmp_path):
    (tmp_path / "a-file").write_bytes(b"")
    with pytest.raises(StorageError, match="Nothing was submitted") as caught:
        Staging(str(tmp_path / "a-file"), PUBLIC).put(b"a cat", "png")
    assert caught.value.retryable


def test_a_bucket_without_a_public_url_signs():
    with s3_server() as (bucket, client):
        staging = Staging(f"{bucket}/staged")
        name = staging.put(b"a cat", "png")
        assert staging.put(b"a cat", "png", doubted=True) == name
        url = staging.url_of(name, 7_200)
        assert f"/pictures/staged/{name}?" in url
        assert "Expires=" in url
        body = client.get_object(Bucket="pictures", Key=f"staged/{name}")["Body"].read()
        assert body == b"a cat"


@pytest.mark.parametrize(
    ("url", "public_url", "told"),
    [
        ("staged", None, "cannot be signed; set FLUX_KONTEXT_STAGING_PUBLIC_URL"),
        ("staged", "pictures.test", "is not an http or https URL"),
        ("staged", "https://pictures.test?sig=1", "without a query"),
        ("staged", "https://me:word@pictures.test", "is not an http or https URL"),
        ("staged", "http://[::1", "is not an http or https URL"),
        ("zip://a::staged", PUBLIC, "chains several filesystems"),
        ("nobody-knows://staged", PUBLIC, "cannot be used"),
        (None, PUBLIC, "FLUX_KONTEXT_STAGING_URL is not: set both"),
    ],
)
def test_a_place_that_nobody_could_fetch_from_is_no_setting(url, public_url, told):
    with pytest.raises(ConfigurationError, match=told):
        create_staging(url, public_url)


def test_no_place_is_none():
    assert create_staging(None, None) is None


@pytest.mark.parametrize(("timeout", "life"), [(0, 3_600), (900, 3_600), (4_000, 8_000)])
def test_signatures_outlast_the_wait_and_are_good_for_an_hour_at_least(timeout, life):
    assert signature_lifetime(timeout) == life
    assert signature_lifetime(10_000_000) == 7 * 24 * 3_600


def test_a_filesystem_that_cannot_sign_is_told_without_what_it_says(tmp_path):
    class Fs:
        def sign(self, path, expiration):
            raise RuntimeError(f"https://{path}?Signature=s3cr3t&{expiration}")

    with pytest.raises(ReferenceImageError, match=r"cannot be signed \(RuntimeError\)") as caught:
        sign_url(Fs(), "bucket/cat.jpg", 60)
    assert "s3cr3t" not in str(caught.value)
    Fs.sign = lambda *_args, **_how: "bucket/cat.jpg"
    with pytest.raises(ReferenceImageError, match="no URL"):
        sign_url(Fs(), "bucket/cat.jpg", 60)
