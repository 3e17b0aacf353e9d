"""Row keys and checks before payment of rows with files or objects as references."""

import dataclasses

import fsspec
import pytest
from fsspec.registry import _registry, known_implementations

from prefect_flux_kontext.batch.reference_checks import with_reference_checks, with_row_keys
from prefect_flux_kontext.manifest.reader import Manifest
from prefect_flux_kontext.manifest.row import RefusedRow, Row
from prefect_flux_kontext.manifest.row_key import compute_row_key
from prefect_flux_kontext.references import resolver
from prefect_flux_kontext.references.identity import identify_private_object, read_version
from prefect_flux_kontext.references.resolver import References
from prefect_flux_kontext.references.staging import Staging
from tests.references.conftest import SIGNATURE, Bucket
from tests.support.pictures import picture
from tests.support.s3 import s3_server

STAGING = Staging("memory://staged", "https://pictures.test")


def manifest(*images, folder=None, **cells):
    rows = [
        {"image": image, "prompt": "oil", "id": str(n), **cells} for n, image in enumerate(images)
    ]
    return Manifest(rows, folder=str(folder) if folder else None)


def keys(rows, references=None):
    result = list(with_row_keys(rows.rows(), references or References()))
    assert all(isinstance(row, Row) for row in result), result
    return [row.key for row in result]


def refused(rows, **how):
    blocks = with_reference_checks(
        rows.rows(), References(how.pop("staging", STAGING), **how), lambda _row: True
    )
    return [row.reason for block in blocks for row in block if isinstance(row, RefusedRow)]


def test_key_of_a_web_reference_is_stable():
    urls = "https://a.test/cat.jpg?X-Amz-Signature=1#x", "http://b.test/a%20cat?v=2"
    assert keys(manifest(*urls, aspect_ratio="16:9")) == [
        "c23a3c0c289629821b473d30aa474aed",
        "2837909b00c6a2195ade6d1d02d02476",
    ]
    assert keys(manifest(*urls)) == [
        "003f9bc2e45dbeecd65f750607bc468d",
        "c8004cb4722d34dec23a501a001637be",
    ]
    assert keys(Manifest([{"id": "x", "prompt": "oil"}])) == ["4e1d913e7941d4ab8f27384bec194f2e"]


def test_key_of_a_file_depends_on_its_content_only(tmp_path):
    for name in ("cat.jpg", "copy.png"):
        (tmp_path / name).write_bytes(b"a cat")
    (tmp_path / "dog.jpg").write_bytes(b"a dog")
    cat, copy, dog = keys(manifest("cat.jpg", "copy.png", "dog.jpg", folder=tmp_path))
    assert cat == copy != dog
    before = cat
    (tmp_path / "cat.jpg").write_bytes(b"another")
    (cat,) = keys(manifest("cat.jpg", folder=tmp_path))
    assert cat != before


def test_key_of_an_object_depends_on_url_and_version():
    seen = []
    with s3_server() as (url, client):
        for body in (b"a cat", b"a dog", b"a cat"):
            client.put_object(Bucket="pictures", Key="cat.jpg", Body=body)
            client.put_object(Bucket="pictures", Key="copy.jpg", Body=body)
            one, other = keys(manifest(f"{url}/cat.jpg", f"{url}/copy.jpg"))
            assert one != other
            seen.append(one)
        assert seen[0] == seen[2] != seen[1]
        fs = fsspec.filesystem("s3")
        (listed,) = [
            entry
            for entry in fs.ls("pictures", detail=True)
            if entry["name"] == "pictures/cat.jpg"
        ]
        # A listing and a request for the object give the same version.
        assert read_version(listed) == read_version(fs.info("pictures/cat.jpg", refresh=True))
        request = next(manifest(f"{url}/cat.jpg").rows()).request
        identity = identify_private_object(f"{url}/cat.jpg", read_version(listed))
        assert compute_row_key(request, {f"{url}/cat.jpg": identity}) == seen[2]


def test_object_without_version_is_identified_by_its_url():
    assert identify_private_object("gs://a/b", read_version({"size": 3})) == "gs://a/b"


def test_rows_stay_in_order_and_files_are_identified_once(tmp_path, monkeypatch):
    identified = []
    real = resolver.identify_reference

    def record(reference):
        identified.append(reference)
        return real(reference)

    monkeypatch.setattr(resolver, "identify_reference", record)
    for number in range(7):
        (tmp_path / f"{number}.jpg").write_bytes(bytes([number]))
    rows = manifest(*(f"{n % 7}.jpg" for n in range(1_000)), folder=tmp_path)
    references = References()
    result = list(with_row_keys(rows.rows(), references))
    assert [row.id for row in result] == [str(n) for n in range(1_000)]
    assert len({row.key for row in result}) == 7
    # The run after the plan does not read them again.
    assert keys(rows, references) == [row.key for row in result]
    assert len(identified) == 7


def test_check_reports_every_invalid_reference(tmp_path, bucket):
    (tmp_path / "good.jpg").write_bytes(picture())
    (tmp_path / "text.jpg").write_bytes(b"a cat, in words")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "large.jpg").write_bytes(bytes(11_000_000))
    (tmp_path / "a-folder").mkdir()
    bucket.pipe_file("photos/text.jpg", b"<svg/>")
    rows = manifest(
        "good.jpg",
        "text.jpg",
        "empty.jpg",
        "large.jpg",
        "a-folder",
        "none.jpg",
        "gs://photos/cat.jpg",
        "gs://photos/text.jpg",
        "gs://photos/none.jpg",
        "gs://photos/denied.jpg",
        "gs://photos/broken.jpg",
        "https://a.test/cat.jpg",
        folder=tmp_path,
    )
    result = refused(rows)
    too_large = "has 11.0 MB; the service takes 10 MB; shrink it, or use --fit-references"
    assert [reason.rpartition("' ")[2] for reason in result] == [
        "is text by its content; the service takes JPG, PNG and WebP",
        "is an empty file",
        f"{too_large} (in a flow, fit_references)",
        "is a folder",
        "does not exist",
        "is an SVG by its content; the service takes JPG, PNG and WebP",
        "does not exist",
        "cannot be read: permission denied",
        "cannot be read: OSError: no route to the bucket",
    ]


def test_local_file_without_staging_names_the_settings(tmp_path):
    (tmp_path / "cat.jpg").write_bytes(picture())
    (result,) = refused(manifest("cat.jpg", folder=tmp_path), staging=None)
    assert "set FLUX_KONTEXT_STAGING_URL" in result
    assert "FLUX_KONTEXT_STAGING_PUBLIC_URL" in result


def test_shrinking_an_object_needs_a_staging_place(bucket):
    bucket.pipe_file("photos/large.jpg", picture() + bytes(11_000_000))
    rows = manifest("gs://photos/large.jpg")
    assert "the service takes 10 MB" in refused(rows)[0]
    assert "set FLUX_KONTEXT_STAGING_URL" in refused(rows, staging=None, fit=True)[0]
    assert refused(rows, fit=True) == []


def test_references_of_unpaid_rows_are_not_read(tmp_path):
    (tmp_path / "text.jpg").write_bytes(b"text")
    rows = manifest("text.jpg", folder=tmp_path)
    [[row]] = with_reference_checks(rows.rows(), References(STAGING), lambda _row: False)
    assert isinstance(row, Row)


def test_missing_package_is_named(monkeypatch):
    monkeypatch.delitem(_registry, "gs", raising=False)
    missing = {"class": "nobody_has_this.FileSystem", "err": "Please install gcsfs"}
    monkeypatch.setitem(known_implementations, "gs", missing)
    result = next(with_row_keys(manifest("gs://bucket/cat.jpg").rows(), References()))
    assert "needs a package: Please install gcsfs" in result.reason


async def send(references, reference, **how):
    row = next(manifest(reference).rows())
    create_request = await references.prepare(row.request, **how)
    (url,) = (await create_request()).image_urls
    return url


@pytest.mark.anyio
async def test_signature_outlasts_the_timeout(bucket):
    references = References(timeout=4_000)
    assert await send(references, "gs://photos/cat.jpg") == (
        f"https://signed.test/photos/cat.jpg?life=8000&{SIGNATURE}"
    )


@pytest.mark.anyio
@pytest.mark.parametrize("where", ["local", "bucket"])
async def test_changed_reference_is_not_sent(tmp_path, bucket, where, monkeypatch):
    (tmp_path / "cat.jpg").write_bytes(picture())
    reference = str(tmp_path / "cat.jpg") if where == "local" else "gs://photos/cat.jpg"
    references = References(STAGING)
    list(with_reference_checks(manifest(reference).rows(), references, lambda _row: True))
    assert await send(references, reference)
    (tmp_path / "cat.jpg").write_bytes(picture(size=(50, 50)))
    info = Bucket.info
    monkeypatch.setattr(Bucket, "info", lambda *args: info(*args) | {"etag": "v2"})
    with pytest.raises(resolver.ReferenceImageError, match="has changed since the plan"):
        await send(references, reference)


@pytest.mark.anyio
async def test_large_image_is_shrunk_and_staged_once(tmp_path, bucket):
    large = picture() + bytes(11_000_000)
    (tmp_path / "large.jpg").write_bytes(large)
    bucket.pipe_file("photos/large.jpg", large)
    references = References(Staging(str(tmp_path / "staged"), "https://p.test"), fit=True)
    urls = {
        await send(references, str(tmp_path / "large.jpg"), verify_staged=n > 1) for n in range(3)
    }
    urls |= {await send(references, "gs://photos/large.jpg")}
    (file,) = (tmp_path / "staged").iterdir()
    assert urls == {f"https://p.test/{file.name}"}
    assert file.suffix == ".jpg"
    assert file.stat().st_size < 10_000_000


@pytest.mark.anyio
async def test_unplanned_reference_is_checked_before_sending(tmp_path, bucket):
    bucket.pipe_file("photos/text.jpg", b"text")
    (tmp_path / "text.jpg").write_bytes(b"text")
    for reference in ("gs://photos/text.jpg", str(tmp_path / "text.jpg")):
        with pytest.raises(resolver.ReferenceImageError, match="is text"):
            await send(References(STAGING), reference)


def test_with_row_keys_changes_only_the_key(tmp_path):
    (tmp_path / "cat.jpg").write_bytes(b"a cat")
    (row,) = manifest("cat.jpg", folder=tmp_path).rows()
    (result,) = with_row_keys([row], References())
    assert dataclasses.replace(result, key=row.key) == row
