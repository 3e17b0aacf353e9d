"""Thumbnails never fail a batch: those that cannot be made are left out."""

import asyncio
import io
import logging

import httpx
import pytest
from PIL import Image

from prefect_flux_kontext.images.download import open_download_client
from prefect_flux_kontext.report.gallery.thumbnails import ThumbnailStore
from prefect_flux_kontext.report.thumbnails import (
    ThumbnailCollector,
    image_thumbnail_name,
    make_thumbnail,
    reference_thumbnail_name,
)
from prefect_flux_kontext.storage.filesystem import OutputFolder
from tests.support.pictures import picture, png_that_claims

KEY = "ab" * 16
URL = "http://pictures.test/cat.jpg"


def connections(handler):
    return open_download_client(httpx.MockTransport(handler))


def size_of(data):
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "WEBP"
        return image.size


@pytest.mark.parametrize(("kind", "mode"), [("jpeg", "CMYK"), ("png", "LA"), ("webp", "RGBA")])
def test_thumbnail_keeps_the_aspect_ratio(kind, mode):
    assert size_of(make_thumbnail(picture(kind, mode, (960, 480)), 320)) == (320, 160)


def test_thumbnail_is_upright_and_has_no_metadata():
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "camera"
    small = make_thumbnail(picture("jpeg", size=(400, 200), exif=exif), 320)
    assert size_of(small) == (160, 320)
    assert b"camera" not in small


@pytest.mark.parametrize("data", [b"", b"<svg/>", png_that_claims(50_000, 50_000)])
def test_invalid_images_and_bombs_have_no_thumbnail(data):
    with pytest.raises((OSError, ValueError, Image.DecompressionBombError)):
        make_thumbnail(data, 320)


@pytest.mark.anyio
async def test_thumbnails_are_limited_and_taken_once():
    async with connections(lambda _: httpx.Response(404)) as http:
        collector = ThumbnailCollector(http, 2, references=True)
        for key in ("a" * 32, "b" * 32):
            collector.create_thumbnail_callback(key)(Image.new("RGB", (640, 480)))
        assert collector.create_thumbnail_callback("c" * 32) is None
        made = collector.take()
        assert list(made) == [image_thumbnail_name("a" * 32), image_thumbnail_name("b" * 32)]
        assert {size_of(data) for data in made.values()} == {(320, 240)}
        assert collector.take() == {}


@pytest.mark.anyio
async def test_thumbnail_errors_are_ignored():
    async with connections(lambda _: httpx.Response(404)) as http:
        collector = ThumbnailCollector(http, 2, references=True)
        collector.create_thumbnail_callback("a" * 32)(Image.new("F", (0, 0)))
        assert collector.take() == {}


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("status", "content", "made"),
    [
        (200, picture(size=(2_000, 1_000)), True),
        (404, picture(), False),
        (302, picture(), False),
        (200, b"<html>", False),
        (200, picture("png", size=(64, 64)) + b"\0" * (11 * 2**20), False),
    ],
    ids=["an image", "gone", "elsewhere", "a page", "too large"],
)
async def test_reference_is_fetched_once_and_errors_are_ignored(status, content, made):
    asked = []

    def answer(request):
        asked.append(str(request.url))
        headers = {"Location": "http://169.254.169.254/"} if status == 302 else {}
        stream = httpx.ByteStream(content)
        return httpx.Response(status, headers=headers, stream=stream)

    async with connections(answer) as http:
        collector = ThumbnailCollector(http, 10, references=True)
        collector.request_reference([URL, "http://pictures.test/second.jpg"])
        collector.request_reference([URL])
        await collector.wait(10)
        taken = collector.take()
    assert asked == [URL]
    assert list(taken) == ([reference_thumbnail_name(URL)] if made else [])
    assert [size_of(data) for data in taken.values()] == ([(640, 320)] if made else [])


@pytest.mark.anyio
@pytest.mark.parametrize(("most", "references"), [(0, True), (10, False)])
async def test_no_reference_is_fetched_when_turned_off(most, references):
    async with connections(lambda _: pytest.fail("asked")) as http:
        collector = ThumbnailCollector(http, most, references=references)
        collector.request_reference([URL])
        collector.request_reference([])
        await collector.wait(0)
        assert collector.take() == {}


@pytest.mark.anyio
@pytest.mark.virtual_time
async def test_wait_ends_although_a_reference_is_pending():
    async def never(_request):
        await asyncio.Event().wait()

    async with connections(never) as http:
        collector = ThumbnailCollector(http, 10, references=True)
        collector.request_reference([URL])
        began = asyncio.get_running_loop().time()
        await collector.wait(5)
        assert asyncio.get_running_loop().time() - began == pytest.approx(5)
        collector.close()


@pytest.mark.anyio
async def test_signature_of_a_reference_is_not_logged(caplog):
    async with connections(lambda _: httpx.Response(403)) as http:
        collector = ThumbnailCollector(http, 10, references=True)
        with caplog.at_level(logging.DEBUG):
            collector.request_reference([f"{URL}?X-Amz-Signature=canary"])
            await collector.wait(10)
    assert "No thumbnail of a reference" in caplog.text
    assert "canary" not in caplog.text


def test_reference_name_ignores_the_url_signature():
    assert reference_thumbnail_name(f"{URL}?X-Amz-Signature=a") == reference_thumbnail_name(URL)


@pytest.mark.anyio
async def test_thumbnail_store_finds_files_missing_in_its_index(tmp_path):
    first, second = (ThumbnailStore(OutputFolder(str(tmp_path))) for _ in range(2))
    await first.add("one", {f"a{n}": bytes([n]) for n in range(50)})
    await first.load_index()
    await second.add("two", {"b": b"2"})  # then the run is killed
    third = ThumbnailStore(OutputFolder(str(tmp_path)))
    await third.load_index()
    assert len(third.files) == 51
    assert {third.files["a0"], third.files["a49"], third.files["b"]} == {
        "one-1",
        "one-2",
        "two-1",
    }
    assert await third.load(["b", "a49", "missing"]) == {
        "b": "data:image/webp;base64,Mg==",
        "a49": "data:image/webp;base64,MQ==",
    }
