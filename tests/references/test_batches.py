"""Batches with local and private references against the sandbox, which fetches them."""

import asyncio
import csv
import logging

import httpx
import pytest

from prefect_flux_kontext.cli import main
from prefect_flux_kontext.ledger.store import open_ledger_store
from prefect_flux_kontext.manifest.reader import Manifest
from prefect_flux_kontext.references.resolver import References
from prefect_flux_kontext.references.staging import Staging
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from prefect_flux_kontext.storage.filesystem import OutputFolder
from tests.references.conftest import SIGNATURE, Bucket
from tests.support.batches import KEY, run
from tests.support.pictures import picture
from tests.support.plans import build_plan
from tests.support.s3 import s3_server
from tests.support.served_folder import served_folder


@pytest.fixture
def sandbox():
    with running_sandbox(SandboxSettings(mean=0.05, long_edge=16, api_key=KEY)) as running:
        yield running


@pytest.fixture
def staging(tmp_path):
    with served_folder(tmp_path / "staged") as url:
        yield Staging(str(tmp_path / "staged"), url)


@pytest.fixture
def photos(tmp_path):
    """A folder of pictures and a manifest beside them."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, kind in enumerate(("jpeg", "png", "webp")):
        (folder / f"{number}.{kind}").write_bytes(picture(kind))
    lines = [f"r{n},{path.name},oil" for n, path in enumerate(sorted(folder.iterdir()))]
    (folder / "m.csv").write_text("\n".join(["id,image,prompt", *lines]))
    return folder


def count_accepted(sandbox):
    return sandbox.service.bill()["accepted"]


def read_all_files(folder):
    return "".join(p.read_text(errors="replace") for p in folder.rglob("*") if p.is_file())


def run_batch(sandbox, rows, output, **options):
    return asyncio.run(run(sandbox, rows, output, **options))


def test_local_files_are_staged_and_paid_for_once(sandbox, staging, photos, tmp_path):
    references = References(staging)
    rows = Manifest(str(photos / "m.csv"))
    assert build_plan(rows, references=references).to_pay == 3
    summary = run_batch(sandbox, rows, tmp_path / "out", references=references)
    assert summary.complete, str(summary)
    assert len(list((tmp_path / "staged").iterdir())) == 3
    # The ledger holds the references of the manifest, not the staged URLs.
    ledger = read_all_files(tmp_path / "out" / "_ledger")
    assert str(photos / "0.jpeg") in ledger
    assert "127.0.0.1" not in ledger

    # A renamed file is recognized by its content; only the new file is paid for.
    (photos / "0.jpeg").rename(photos / "renamed.jpg")
    (photos / "new.jpg").write_bytes(picture(size=(50, 40)))
    more = Manifest(
        [{"id": n, "image": str(photos / n), "prompt": "oil"} for n in ("renamed.jpg", "new.jpg")]
    )
    summary = run_batch(sandbox, more, tmp_path / "out", references=References(staging))
    assert (summary.stored, summary.already_stored) == (2, 1)
    assert count_accepted(sandbox) == 4


def test_private_objects_are_signed_and_signature_not_stored(sandbox, tmp_path, caplog):
    caplog.set_level(logging.DEBUG, "prefect_flux_kontext")
    # The log of the S3 server itself contains signed URLs.
    caplog.set_level(logging.ERROR, "werkzeug")
    with s3_server() as (bucket, client):
        client.put_object(Bucket="pictures", Key="a cat.jpg", Body=picture())
        rows = Manifest([{"id": "cat", "image": f"{bucket}/a cat.jpg", "prompt": "oil"}])
        summary = run_batch(sandbox, rows, tmp_path)
        assert summary.complete, str(summary)
        again = run_batch(sandbox, rows, tmp_path)
        assert (again.already_stored, count_accepted(sandbox)) == (1, 1)
        client.put_object(Bucket="pictures", Key="a cat.jpg", Body=picture(size=(50, 40)))
        assert run_batch(sandbox, rows, tmp_path).complete
        assert count_accepted(sandbox) == 2
    kept = read_all_files(tmp_path) + caplog.text + summary.model_dump_json()
    assert f"{bucket}/a cat.jpg" in kept
    assert "Signature" not in kept


@pytest.mark.anyio
async def test_signed_url_gives_read_access():
    with s3_server() as (bucket, client):
        client.put_object(Bucket="pictures", Key="a cat.jpg", Body=picture())
        row = next(Manifest([{"image": f"{bucket}/a cat.jpg", "prompt": "oil"}]).rows())
        create_request = await References().prepare(row.request)
        (url,) = (await create_request()).image_urls
        assert "Signature=" in url
        async with httpx.AsyncClient() as http:
            assert (await http.get(url)).status_code == 200


def test_corrupt_staged_file_is_replaced_and_row_retried(sandbox, staging, photos, tmp_path):
    content = (photos / "0.jpeg").read_bytes()
    name = staging.put(content, "jpeg")
    (tmp_path / "staged" / name).write_bytes(bytes(len(content)))
    rows = Manifest([{"id": "x", "image": str(photos / "0.jpeg"), "prompt": "oil"}])
    summary = run_batch(sandbox, rows, tmp_path / "out", references=References(staging))
    assert summary.complete, str(summary)
    assert count_accepted(sandbox) == 2
    assert (tmp_path / "staged" / name).read_bytes() == content


def test_failing_signed_reference_is_not_retried_further(
    sandbox, bucket, tmp_path, caplog, monkeypatch
):
    """Two attempts are paid for, and the signature is in no message, log or file."""
    caplog.set_level(logging.DEBUG, "prefect_flux_kontext")
    monkeypatch.setattr(Bucket, "base_url", "http://127.0.0.1:1")
    rows = Manifest([{"id": "x", "image": "gs://photos/cat.jpg", "prompt": "oil"}])
    summary = run_batch(sandbox, rows, tmp_path)
    assert summary.reasons == {"INVALID_IMAGE_URL": 1}
    assert count_accepted(sandbox) == 2
    kept = read_all_files(tmp_path) + caplog.text + summary.model_dump_json()
    assert "http://127.0.0.1:1/photos/cat.jpg" in kept
    assert SIGNATURE not in kept
    assert "s3cr3t" not in kept
    # Neither the next plan nor the next run pays for it again.
    store = open_ledger_store(OutputFolder(str(tmp_path)))
    assert build_plan(rows, store).to_pay == 0
    run_batch(sandbox, rows, tmp_path)
    assert count_accepted(sandbox) == 2


def test_failing_web_reference_is_paid_for_once(sandbox, tmp_path):
    rows = Manifest([{"id": "x", "image": "http://127.0.0.1:1/cat.jpg", "prompt": "oil"}])
    summary = run_batch(sandbox, rows, tmp_path)
    assert summary.reasons == {"INVALID_IMAGE_URL": 1}
    assert count_accepted(sandbox) == 1


def test_file_changed_after_the_plan_fails_unpaid(sandbox, staging, photos, tmp_path):
    references = References(staging)
    rows = Manifest(str(photos / "m.csv"))
    assert build_plan(rows, references=references).to_pay == 3
    (photos / "0.jpeg").write_bytes(picture(size=(50, 40)))
    (photos / "1.png").unlink()
    summary = run_batch(sandbox, rows, tmp_path / "out", references=references)
    assert (summary.stored, summary.reasons) == (1, {"ReferenceImageError": 2})
    changed, gone = sorted(row.message for row in summary.failures)
    assert "has changed since the plan" in changed
    assert "does not exist" in gone
    assert count_accepted(sandbox) == 1


def test_failed_csv_holds_absolute_paths_and_runs_again(
    sandbox, staging, photos, tmp_path, monkeypatch
):
    rows = Manifest(str(photos / "m.csv"))
    references = References(staging)
    list(build_plan(rows, references=references).problems)
    (photos / "0.jpeg").rename(photos / "away")
    run_batch(sandbox, rows, tmp_path / "out", references=references)
    (photos / "away").rename(photos / "0.jpeg")
    with (tmp_path / "out" / "failed.csv").open() as file:
        (failed,) = csv.DictReader(file)
    assert failed["image"] == str(photos / "0.jpeg")
    again = Manifest(str(tmp_path / "out" / "failed.csv"))
    assert run_batch(sandbox, again, tmp_path / "out", references=References(staging)).complete
    assert count_accepted(sandbox) == 3


def test_failing_staging_place_costs_nothing(sandbox, photos, tmp_path):
    (tmp_path / "a-file").write_bytes(b"")
    references = References(Staging(str(tmp_path / "a-file"), "http://127.0.0.1:1"))
    rows = Manifest(str(photos / "m.csv"))
    summary = run_batch(sandbox, rows, tmp_path / "out", references=references)
    assert summary.reasons == {"StorageError": 3}
    assert count_accepted(sandbox) == 0


def test_many_invalid_images_do_not_stop_the_batch(sandbox, staging, photos, tmp_path):
    (photos / "text.jpg").write_bytes(b"text")
    bad = [{"id": f"b{n}", "image": "text.jpg", "prompt": f"{n}"} for n in range(40)]
    good = [{"id": "good", "image": "0.jpeg", "prompt": "oil"}]
    rows = Manifest(bad + good, folder=str(photos))
    summary = run_batch(sandbox, rows, tmp_path / "out", references=References(staging))
    assert (summary.stored, summary.failed, count_accepted(sandbox)) == (1, 40, 1)


def test_fit_references_option_shrinks_large_images(
    sandbox, photos, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("FLUX_KONTEXT_API_KEY", KEY)
    monkeypatch.setenv("FLUX_KONTEXT_BASE_URL", sandbox.url)
    monkeypatch.setenv("FLUX_KONTEXT_POLL_INITIAL_DELAY", "0")
    monkeypatch.setenv("FLUX_KONTEXT_POLL_INTERVAL", "0.05")
    (photos / "0.jpeg").write_bytes(picture() + bytes(11_000_000))
    batch = [str(photos / "m.csv"), str(tmp_path / "out")]
    with served_folder(tmp_path / "staged") as url:
        monkeypatch.setenv("FLUX_KONTEXT_STAGING_URL", str(tmp_path / "staged"))
        monkeypatch.setenv("FLUX_KONTEXT_STAGING_PUBLIC_URL", url)
        assert main(["run", *batch]) == 2
        assert "line 2, 'r0': image" in capsys.readouterr().err
        assert count_accepted(sandbox) == 0
        assert main(["run", *batch, "--fit-references"]) == 0
    assert "3 of 3 rows stored" in capsys.readouterr().out
    assert max(path.stat().st_size for path in (tmp_path / "staged").iterdir()) < 100_000
