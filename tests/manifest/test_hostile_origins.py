"""What hosts of results may answer, over real connections: a whole image is stored, nothing else.

Each row of the table is an origin. Whatever it does ends in a stored image or in one clear error,
within bounds of memory and time.
"""

import asyncio
import gzip
import io
import tracemalloc
import zlib

import pytest
from PIL import Image

from prefect_flux_kontext.errors import DownloadError, InvalidImageError, RefusedUrlError
from prefect_flux_kontext.images import download as downloading
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
    packer = zlib.compressobj(wbits=zlib.MAX_WBITS | 16)
    return b"".join(packer.compress(MEGABYTE) for _ in range(100)) + packer.flush()


def raw(*pieces):
    """Just these bytes, then the connection is closed."""

    async def play(writer):
        for piece in pieces:
            writer.write(piece)
        await writer.drain()
        return False

    return play


def without_end(head, piece):
    """A head, then the same piece for ever."""

    async def play(writer):
        writer.write(head)
        while True:
            writer.write(piece)
            await writer.drain()

    return play


def drop_by_drop(head, piece):
    """A head, then a piece now and then, for ever."""

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
    # What is right, if not always told so.
    "an image": (reply(200, JPEG), STORED),
    "an image in chunks": (chunked(JPEG[:100], JPEG[100:]), STORED),
    "an image without a length": (raw(OK + b"\r\n" + JPEG), STORED),
    "an image said to be a page": (reply(200, JPEG, content_type="text/html"), STORED),
    # Replies that are no image.
    "a page": (html(200), InvalidImageError),
    "JSON": (reply(200, {"error": "later"}), InvalidImageError),
    "nothing": (reply(200, b""), InvalidImageError),
    "a byte": (reply(200, b"\xff"), InvalidImageError),
    "a GIF": (reply(200, gif()), InvalidImageError),
    "an SVG": (reply(200, b"<svg xmlns='http://www.w3.org/2000/svg'/>"), InvalidImageError),
    "an image packed with gzip": (
        reply(200, gzip.compress(JPEG), content_encoding="gzip"),
        InvalidImageError,
    ),
    "a gzip bomb": (reply(200, gzip_bomb(), content_encoding="gzip"), InvalidImageError),
    "a pixel bomb": (reply(200, png_that_claims(50_000, 50_000)), InvalidImageError),
    # Parts of an image.
    "half an image as if it were whole": (reply(200, JPEG[: len(JPEG) // 2]), InvalidImageError),
    "all but the end of a PNG": (reply(200, PNG[:-5]), InvalidImageError),
    "half an image without a length": (raw(OK + b"\r\n" + JPEG[:700]), InvalidImageError),
    "half of what was promised": (sized(len(JPEG), JPEG[:700]), DownloadError),
    "ten gigabytes promised": (sized(10**10, JPEG), DownloadError),
    "a chunk that is cut off": (
        raw(OK + b"Transfer-Encoding: chunked\r\n\r\nffff\r\n" + JPEG),
        DownloadError,
    ),
    # Other statuses, with an image or without.
    "204": (raw(b"HTTP/1.1 204 No Content\r\n\r\n"), DownloadError),
    "206": (reply(206, JPEG), DownloadError),
    "403 with an image": (reply(403, JPEG), DownloadError),
    "404": (html(404), DownloadError),
    "500": (html(500), DownloadError),
    "304": (raw(b"HTTP/1.1 304 Not Modified\r\n\r\n"), DownloadError),
    # Broken HTTP.
    "no HTTP": (raw(b"SSH-2.0-OpenSSH_9.9\r\n"), DownloadError),
    "a length below nothing": (sized(-1, JPEG), DownloadError),
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
    # More than anybody wants.
    "a body without end": (without_end(OK + b"\r\n", MEGABYTE), DownloadError),
    "chunks without end": (
        without_end(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"100000\r\n%b\r\n" % MEGABYTE),
        DownloadError,
    ),
    "a header of a megabyte": (raw(OK + b"X: " + MEGABYTE + b"\r\n\r\n" + JPEG), DownloadError),
    "a hundred thousand headers": (raw(OK + b"X: y\r\n" * 100_000 + b"\r\n"), DownloadError),
    "headers without end": (without_end(OK, b"X: y\r\n" * 1_000), DownloadError),
    "a first line without end": (without_end(b"HTTP/1.1 200 ", b"O" * 9_000), DownloadError),
    # Redirects.
    "a redirect to itself": (redirect("/"), DownloadError),
    "a redirect to nowhere": (redirect("http://[::1"), DownloadError),
    "a redirect to a file": (redirect("file:///etc/passwd"), RefusedUrlError),
    "a redirect to FTP": (redirect("ftp://127.0.0.1/a.jpg"), RefusedUrlError),
    "a redirect to metadata": (redirect("http://169.254.169.254/latest/"), RefusedUrlError),
    "a redirect into a network": (redirect("http://10.0.0.1/a.jpg"), RefusedUrlError),
    "a redirect to a number": (redirect("http://2852039166/latest/"), RefusedUrlError),
}

SLOW = {
    "silence": silence,
    "a head that never ends": drop_by_drop(OK, b"X: y\r\n"),
    "a body that never ends": drop_by_drop(OK + b"Content-Length: 99999\r\n\r\n", b"x"),
    "a promise to go on, again and again": drop_by_drop(b"", b"HTTP/1.1 102 Processing\r\n\r\n"),
}


@pytest.fixture(autouse=True)
def _one_attempt(monkeypatch):
    monkeypatch.setattr(downloading, "_ATTEMPTS", 1)


async def persist(origin, output):
    async with ScriptedServer(origin) as server, open_download_client(base_url=server.url) as http:
        result = GenerationResult(task_id="task_1", result_urls=[f"{server.url}/?key=canary"])
        return await persist_result(result, OutputFolder(output), http, name="cat", ai_mark=False)


@pytest.mark.parametrize("name", ORIGINS)
async def test_an_origin_gives_a_whole_image_or_one_clear_error(name, tmp_path):
    origin, expected = ORIGINS[name]
    if expected is STORED:
        (stored,) = await persist(origin, tmp_path)
        assert (tmp_path / "cat.jpg").read_bytes() == JPEG
        assert stored.size == len(JPEG)
        return
    with pytest.raises(expected) as raised:
        await persist(origin, tmp_path)
    assert type(raised.value) is expected, raised.value
    assert raised.value.message.startswith("Task task_1 is paid for, but its result http://127")
    assert len(raised.value.message) < 600
    assert "canary" not in raised.value.message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", SLOW)
async def test_an_origin_that_takes_its_time_is_left(name, tmp_path, monkeypatch):
    monkeypatch.setattr(downloading, "_LONGEST_ATTEMPT", 0.5)
    with pytest.raises(DownloadError, match="TimeoutError"):
        await persist(SLOW[name], tmp_path)
    assert list(tmp_path.iterdir()) == []


async def test_no_origin_makes_memory_grow_beyond_the_largest_image(tmp_path):
    tracemalloc.start()
    try:
        for name, (origin, expected) in ORIGINS.items():
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            if expected is not STORED:
                with pytest.raises(expected):
                    await persist(origin, tmp_path)
            _, peak = tracemalloc.get_traced_memory()
            assert peak - before < 80 * 2**20, name
    finally:
        tracemalloc.stop()
