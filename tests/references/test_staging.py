"""Files are staged once, under a name made from their content."""

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from prefect_flux_kontext.errors import ConfigurationError, ReferenceImageError, StorageError
from prefect_flux_kontext.references import staging as staging_module
from prefect_flux_kontext.references.staging import (
    Staging,
    choose_signature_lifetime,
    create_staging,
    sign_url,
)
from tests.support.s3 import s3_server

PUBLIC = "https://pictures.test/staged/"


@pytest.fixture
def writes(monkeypatch):
    """Return the list of paths that were written."""
    paths = []
    create = staging_module.create_file

    def record(fs, path, data):
        paths.append(path)
        create(fs, path, data)

    monkeypatch.setattr(staging_module, "create_file", record)
    return paths


def test_put_names_the_file_by_its_content(tmp_path):
    staging = Staging(str(tmp_path / "new"), PUBLIC)
    name = staging.put(b"a cat", "webp")
    assert name == f"{hashlib.sha256(b'a cat').hexdigest()}.webp"
    assert (tmp_path / "new" / name).read_bytes() == b"a cat"
    assert staging.build_url(name, 60) == f"https://pictures.test/staged/{name}"


def test_concurrent_puts_of_equal_content_write_once(tmp_path, writes):
    staging = Staging(str(tmp_path), PUBLIC)
    together = threading.Barrier(8)

    def put(_number):
        together.wait()
        return staging.put(b"a cat", "png")

    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(put, range(8)))) == 1
    Staging(str(tmp_path), PUBLIC).put(b"a cat", "png")
    assert len(writes) == 1


@pytest.mark.parametrize("verify_staged", [False, True])
def test_incomplete_file_is_replaced(tmp_path, verify_staged):
    staging = Staging(str(tmp_path), PUBLIC)
    (tmp_path / staging.put(b"a cat", "png")).write_bytes(b"a c")
    name = staging.put(b"a cat", "png", verify_staged=verify_staged)
    assert (tmp_path / name).read_bytes() == b"a cat"


def test_doubted_file_is_compared_by_content(tmp_path):
    staging = Staging(str(tmp_path), PUBLIC)
    (tmp_path / staging.put(b"a cat", "png")).write_bytes(b"a dog")
    staging.put(b"a cat", "png", verify_staged=True)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"a cat"]


def test_failing_place_raises_retryable_error(tmp_path):
    (tmp_path / "a-file").write_bytes(b"")
    with pytest.raises(StorageError, match="Nothing was submitted") as caught:
        Staging(str(tmp_path / "a-file"), PUBLIC).put(b"a cat", "png")
    assert caught.value.retryable


def test_bucket_without_public_url_signs_urls():
    with s3_server() as (bucket, client):
        staging = Staging(f"{bucket}/staged")
        name = staging.put(b"a cat", "png")
        assert staging.put(b"a cat", "png", verify_staged=True) == name
        url = staging.build_url(name, 7_200)
        assert f"/pictures/staged/{name}?" in url
        assert "Expires=" in url
        body = client.get_object(Bucket="pictures", Key=f"staged/{name}")["Body"].read()
        assert body == b"a cat"


@pytest.mark.parametrize(
    ("url", "public_url", "message"),
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
def test_unusable_settings_are_refused(url, public_url, message):
    with pytest.raises(ConfigurationError, match=message):
        create_staging(url, public_url)


def test_create_staging_returns_none_without_settings():
    assert create_staging(None, None) is None


@pytest.mark.parametrize(("timeout", "life"), [(0, 3_600), (900, 3_600), (4_000, 8_000)])
def test_signature_lifetime_is_an_hour_to_a_week(timeout, life):
    assert choose_signature_lifetime(timeout) == life
    assert choose_signature_lifetime(10_000_000) == 7 * 24 * 3_600


def test_signing_error_hides_the_original_text(tmp_path):
    class Fs:
        def sign(self, path, expiration):
            raise RuntimeError(f"https://{path}?Signature=s3cr3t&{expiration}")

    with pytest.raises(ReferenceImageError, match=r"cannot be signed \(RuntimeError\)") as caught:
        sign_url(Fs(), "bucket/cat.jpg", 60)
    assert "s3cr3t" not in str(caught.value)
    Fs.sign = lambda *_args, **_how: "bucket/cat.jpg"
    with pytest.raises(ReferenceImageError, match="returned no http or https URL"):
        sign_url(Fs(), "bucket/cat.jpg", 60)
