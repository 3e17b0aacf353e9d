"""Hostile origins of results, over real connections: only a whole image is stored.

Each row of the table is an origin. Each ends in a stored image or in one clear error, within
limits of memory and time.
"""

import asyncio
import gzip
import io
import tracemalloc
import zlib

import pytest
from PIL import Image

from prefect_flux_kontext.errors import DownloadError, InvalidImageError, RefusedUrlError
from prefect_flux_kontext.images import download
from prefect_flux_kontext.images.download import open_download_client
from prefect_flux_kontext.images.persist import persist_result
from prefect_flux_kontext.models import GenerationResult
from prefect_flux_kontext.storage.filesystem import OutputFolder
from tests.support.pictures import picture, png_that_claims
from tests.support.scripted_server import (
    ScriptedServer,
    hang_up,
    html,
    redirect,
    reply,
    reset,
    silence,
)

pytestmark = pytest.mark.anyio

JPEG, PNG = picture("jpeg"), picture("png")
STORED = None
OK = b"HTTP/1.1 200 OK\r\n"
MEGABYTE = bytes(2**20)


def gif():
    file = io.BytesIO()
    Image.new("P", (8, 8)).save(file, "GIF")
    return file.getvalue()


def gzip_bomb():
    compressor = zlib.compressobj(wbits=zlib.MAX_WBITS | 16)
    return b"".join(compressor.compress(MEGABYTE) for _ in range(100)) + compressor.flush()


def raw(*pieces):
    """Send the given bytes, then close the connection."""

    async def play(writer):
        for piece in pieces:
            writer.write(piece)
        await writer.drain()
        return False

    return play


def endless(head, piece):
    """Send a head, then the same piece without end."""

    async def play(writer):
        writer.write(head)
        while True:
            writer.write(piece)
            await writer.drain()

    return play


def slow(head, piece):
    """Send a head, then a piece every 20 ms without end."""

    async def play(writer):
        writer.write(head)
        while True:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.02)

    return play


def chunked(*pieces):
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return raw(OK + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")


def sized(size, body):
    return raw(OK + b"Content-Length: %d\r\n\r\n" % size + body)


ORIGINS = {
    # Valid images, some with misleading headers.
    "an image": (reply(200, JPEG), STORED),
    "an image in chunks": (chunked(JPEG[:100], JPEG[100:]), STORED),
    "an image without a length": (raw(OK + b"\r\n" + JPEG), STORED),
    "an image labeled as a page": (reply(200, JPEG, content_type="text/html"), STORED),
    # Replies that are not images.
    "a page": (html(200), InvalidImageError),
    "JSON": (reply(200, {"error": "later"}), InvalidImageError),
    "nothing": (reply(200, b""), InvalidImageError),
    "a byte": (reply(200, b"\xff"), InvalidImageError),
    "a GIF": (reply(200, gif()), InvalidImageError),
    "an SVG": (reply(200, b"<svg xmlns='http://www.w3.org/2000/svg'/>"), InvalidImageError),
    "an image compressed with gzip": (
        reply(200, gzip.compress(JPEG), content_encoding="gzip"),
        InvalidImageError,
    ),
    "a gzip bomb": (reply(200, gzip_bomb(), content_encoding="gzip"), InvalidImageError),
    "a pixel bomb": (reply(200, png_that_claims(50_000, 50_000)), InvalidImageError),
    # Incomplete images.
    "half an image with its own length": (reply(200, JPEG[: len(JPEG) // 2]), InvalidImageError),
    "all but the end of a PNG": (reply(200, PNG[:-5]), InvalidImageError),
    "half an image without a length": (raw(OK + b"\r\n" + JPEG[:700]), InvalidImageError),
    "half of the declared length": (sized(len(JPEG), JPEG[:700]), DownloadError),
    "ten gigabytes declared": (sized(10**10, JPEG), DownloadError),
    "a truncated chunk": (
        raw(OK + b"Transfer-Encoding: chunked\r\n\r\nffff\r\n" + JPEG),
        DownloadError,
    ),
    # Other statuses, with or without an image.
    "204": (raw(b"HTTP/1.1 204 No Content\r\n\r\n"), DownloadError),
    "206": (reply(206, JPEG), DownloadError),
    "403 with an image": (reply(403, JPEG), DownloadError),
    "404": (html(404), DownloadError),
    "500": (html(500), DownloadError),
    "304": (raw(b"HTTP/1.1 304 Not Modified\r\n\r\n"), DownloadError),
    # Broken HTTP.
    "no HTTP": (raw(b"SSH-2.0-OpenSSH_9.9\r\n"), DownloadError),
    "a negative length": (sized(-1, JPEG), DownloadError),
    "two lengths": (
        raw(OK + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd"),
        DownloadError,
    ),
    "a chunk of an odd size": (
        raw(OK + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffffffffff\r\n" + JPEG),
        DownloadError,
    ),
    "a hang-up": (hang_up, DownloadError),
    "a reset": (reset, DownloadError),
    # Endless or oversized replies.
    "a body without end": (endless(OK + b"\r\n", MEGABYTE), DownloadError),
    "chunks without end": (
        endless(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"100000\r\n%b\r\n" % MEGABYTE),
        DownloadError,
    ),
    "a header of a megabyte": (raw(OK + b"X: " + MEGABYTE + b"\r\n\r\n" + JPEG), DownloadError),
    "990 headers of 65 kB": (
        raw(OK, *[b"X%d: %b\r\n" % (n, bytes(65_000)) for n in range(990)], b"\r\n" + JPEG),
        DownloadError,
    ),
    "120 headers": (raw(OK + b"X: y\r\n" * 120 + b"\r\n" + JPEG), DownloadError),
    "a hundred thousand headers": (raw(OK + b"X: y\r\n" * 100_000 + b"\r\n"), DownloadError),
    "headers without end": (endless(OK, b"X: y\r\n" * 1_000), DownloadError),
    "a first line without end": (endless(b"HTTP/1.1 200 ", b"O" * 9_000), DownloadError),
    # Redirects.
    "a redirect to itself": (redirect("/"), DownloadError),
    "a redirect to nowhere": (redirect("http://[::1"), DownloadError),
    "a redirect to a file": (redirect("file:///etc/passwd"), RefusedUrlError),
    "a redirect to FTP": (redirect("ftp://127.0.0.1/a.jpg"), RefusedUrlError),
    "a redirect to metadata": (redirect("http://169.254.169.254/latest/"), RefusedUrlError),
    "a redirect into a network": (redirect("http://10.0.0.1/a.jpg"), RefusedUrlError),
    "a redirect to a decimal address": (redirect("http://2852039166/latest/"), RefusedUrlError),
}

SLOW = {
    "silence": silence,
    "a head that never ends": slow(OK, b"X: y\r\n"),
    "a body that never ends": slow(OK + b"Content-Length: 99999\r\n\r\n", b"x"),
    "endless interim replies": slow(b"", b"HTTP/1.1 102 Processing\r\n\r\n"),
}


@pytest.fixture(autouse=True)
def _one_attempt(monkeypatch):
    monkeypatch.setattr(download, "_MAX_ATTEMPTS", 1)


async def download_and_persist(origin, output):
    async with ScriptedServer(origin) as server, open_download_client(base_url=server.url) as http:
        result = GenerationResult(task_id="task_1", result_urls=[f"{server.url}/?key=canary"])
        return await persist_result(result, OutputFolder(output), http, name="cat", ai_mark=False)


@pytest.mark.parametrize("name", ORIGINS)
async def test_origin_gives_a_whole_image_or_one_clear_error(name, tmp_path):
    origin, expected = ORIGINS[name]
    if expected is STORED:
        (stored,) = await download_and_persist(origin, tmp_path)
        assert (tmp_path / "cat.jpg").read_bytes() == JPEG
        assert stored.size == len(JPEG)
        return
    with pytest.raises(expected) as raised:
        await download_and_persist(origin, tmp_path)
    assert type(raised.value) is expected, raised.value
    assert raised.value.message.startswith("Task task_1 is paid for, but its result http://127")
    assert len(raised.value.message) < 600
    assert "canary" not in raised.value.message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", SLOW)
async def test_slow_origin_times_out(name, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_ATTEMPT_TIMEOUT_SECONDS", 0.5)
    with pytest.raises(DownloadError, match="TimeoutError"):
        await download_and_persist(SLOW[name], tmp_path)
    assert list(tmp_path.iterdir()) == []


async def test_no_origin_exceeds_the_memory_limit(tmp_path):
    tracemalloc.start()
    try:
        for name, (origin, expected) in ORIGINS.items():
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            if expected is not STORED:
                with pytest.raises(expected):
                    await download_and_persist(origin, tmp_path)
            _, peak = tracemalloc.get_traced_memory()
            assert peak - before < 80 * 2**20, name
    finally:
        tracemalloc.stop()
