"""What a notebook shows of results, and the results as tables."""

import asyncio
import base64
import io
import re

import pytest
from PIL import Image

from prefect_flux_kontext.batch.summary import BatchSummary
from prefect_flux_kontext.errors import StorageError
from prefect_flux_kontext.manifest.reader import Manifest
from prefect_flux_kontext.models import GenerationRequest, GenerationResult, StoredImage
from prefect_flux_kontext.orchestration.approval import _show_references
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from tests.support.batches import KEY, run
from tests.support.pictures import picture
from tests.test_redaction import SECRET, UNUSUAL, URLS

MARKUP = "<script>alert(1)</script>"


def thumbnails(page):
    """Return the sizes of the pictures that a page contains."""
    found = re.findall(r'src="data:image/webp;base64,([^"]+)"', page)
    return [Image.open(io.BytesIO(base64.b64decode(data))).size for data in found]


def stored_image(uri):
    return StoredImage(
        uri=uri, task_id="t", format="jpeg", size=9, sha256="0", width=960, height=720
    )


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    """The summary of a batch of two rows, and its output."""
    output = tmp_path_factory.mktemp("my pictures")
    rows = Manifest([{"id": "a", "prompt": "oil"}, {"id": "b", "prompt": "nsfw"}])
    with running_sandbox(SandboxSettings(mean=0.05, long_edge=64, api_key=KEY)) as sandbox:
        return asyncio.run(run(sandbox, rows, output))


def test_summary_shows_contact_sheet_and_failures(batch):
    page = batch._repr_html_()
    assert len(thumbnails(page)) == 1
    assert "1 of 2 rows stored" in page
    assert "<td>b</td><td>2</td><td>failed</td>" in page


def test_stored_image_shows_a_thumbnail(tmp_path):
    path = tmp_path / "a b%20.jpg"
    path.write_bytes(picture(size=(960, 720)))
    for uri in (str(path), f"file://{path}"):
        assert thumbnails(stored_image(uri)._repr_html_()) == [(320, 240)]


@pytest.mark.parametrize("uri", ["s3://bucket/a.jpg", "/none.jpg", "https://x.test/a.jpg", "\0"])
def test_image_elsewhere_shows_its_uri(uri):
    page = stored_image(uri)._repr_html_()
    assert uri in page
    assert "<img" not in page


def test_broken_image_shows_its_uri(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(picture()[:200])
    assert "<img" not in stored_image(str(path))._repr_html_()


def test_result_shows_before_and_after_without_signatures():
    """A saved notebook must not hold a signed URL."""
    request = GenerationRequest(prompt="x", image_urls=["https://x.test/a.jpg"])
    urls = ["https://x.test/b.jpg", "https://x.test/c.jpg?sig=secret"]
    page = GenerationResult(task_id="t", result_urls=urls, request=request)._repr_html_()
    assert re.findall(r'src="([^"]+)".*?<figcaption>(.*?)<', page) == [
        ("https://x.test/a.jpg", "before"),
        ("https://x.test/b.jpg", "after"),
    ]
    assert "secret" not in page


@pytest.mark.parametrize("url", [url for url in [*URLS, *UNUSUAL] if url.startswith("http")])
def test_secret_of_a_url_is_not_shown(url):
    """Signatures are not only in queries: some are in the path, and passwords before the host."""
    result = GenerationResult(
        task_id="t", result_urls=[url], request=GenerationRequest(prompt=f"see {url}")
    )
    manifest = Manifest([{"image": url, "prompt": "oil"}])
    shown = _show_references(manifest) + result._repr_html_() + repr(result) + repr(result.request)
    assert SECRET not in shown


def test_markup_is_only_shown():
    summary = BatchSummary.model_validate(
        {
            "output": MARKUP,
            "reasons": {MARKUP: 1},
            "failures": [{"id": MARKUP, "line": 1, "state": "failed", "message": MARKUP}],
        }
    )
    result = GenerationResult(task_id=MARKUP, result_urls=[f'https://x.test/"{MARKUP}'])
    for shown in (summary, result, stored_image(MARKUP)):
        assert "<script>" not in shown._repr_html_()
        assert '/"&lt;' not in shown._repr_html_()


@pytest.mark.parametrize("name", ["to_pandas", "to_polars"])
def test_results_are_a_table(batch, name):
    table = getattr(batch, name)()
    assert list(table["id"]) == ["a", "b"]
    assert list(table["state"]) == ["stored", "failed"]


def test_results_that_cannot_be_read_are_an_error(tmp_path):
    with pytest.raises(StorageError, match=r"results\.jsonl cannot be read"):
        BatchSummary(output=str(tmp_path)).to_polars()
