"""Images that are cut, empty, of another kind, bombs, or somewhere else."""

import io
import zlib

import httpx
import pytest
from PIL import Image

from tests.sandbox.faults.asking import ended, plan


def test_an_image_is_cut_off_and_nothing_says_so(http):
    _, url = ended(http)
    whole = http.get(url).content
    plan(http, "download:truncated")
    reply = http.get(url)
    assert "content-length" not in reply.headers
    assert reply.content == whole[: len(whole) // 2]


def test_an_image_is_empty(http):
    _, url = ended(http)
    plan(http, "download:empty")
    assert (http.get(url).status_code, http.get(url).content) == (200, b"")


def test_an_image_is_of_another_kind_than_it_says(http):
    _, url = ended(http)
    plan(http, "download:wrong-kind")
    reply = http.get(url)
    assert reply.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(reply.content)).format == "WEBP"
    missing = http.get("/results/task_none/1.jpg")
    assert (missing.status_code, missing.json()["code"]) == (404, 404)


def test_a_small_body_unpacks_to_a_quarter_of_a_gigabyte(http):
    _, url = ended(http)
    plan(http, "download:gzip-bomb")
    with http.stream("GET", url) as reply:
        assert reply.headers["content-encoding"] == "gzip"
        packed = b"".join(reply.iter_raw())
    assert len(packed) < 400_000
    unpacked = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(packed, 1_000_000)
    assert unpacked == bytes(1_000_000)
    # The last four bytes of a gzip file are the unpacked size.
    assert int.from_bytes(packed[-4:], "little") == 256 << 20


def test_a_small_png_has_nearly_a_billion_pixels(http):
    _, url = ended(http)
    plan(http, "download:pixel-bomb")
    content = http.get(url).content
    assert len(content) < 1_000
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(content))


def test_a_download_is_redirected_to_a_file_or_round_and_round(http):
    _, url = ended(http)
    plan(http, "download:redirect-away@1", "download:redirect-round")
    reply = http.get(url)
    assert (reply.status_code, reply.headers["location"]) == (302, "file:///etc/hostname")
    with pytest.raises(httpx.TooManyRedirects):
        http.get(url, follow_redirects=True)
