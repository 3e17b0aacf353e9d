"""Downloads are retried until the image is whole, resumed where safe, and time out."""

import asyncio

import httpx
import pytest

from prefect_flux_kontext.errors import DownloadError
from prefect_flux_kontext.images.decode import inspect_image
from prefect_flux_kontext.images.download import download_image, open_download_client
from tests.support.pictures import picture

JPEG, OTHER = picture("jpeg"), picture("jpeg", size=(90, 70))

HALF = len(JPEG) // 2


STRONG, WEAK = '"version-1"', 'W/"version-1"'


class Piecewise(httpx.AsyncByteStream):
    """A body sent in pieces; a number is a pause in seconds, None a lost connection."""

    def __init__(self, *pieces):
        self.pieces = pieces

    async def __aiter__(self):
        for piece in self.pieces:
            if piece is None:
                raise httpx.ReadError("reset")
            if isinstance(piece, bytes):
                yield piece
            else:
                await asyncio.sleep(piece)


class Files(httpx.AsyncBaseTransport):
    """A server of one file that gives its answers in order and repeats the last one.

    An answer is (ETag or None, data, length of the first cut or None). A range request is served
    as such if the ETag is the one that the client has.
    """

    def __init__(self, *answers, ranges=True):
        self.answers = answers
        self.ranges = ranges
        self.requests = []
        self.statuses = []

    async def handle_async_request(self, request):
        self.requests.append(request)
        etag, whole, cut = self.answers[min(len(self.requests), len(self.answers)) - 1]
        headers = {"ETag": etag} if etag else {}
        begin, status = 0, 200
        if self.ranges and "Range" in request.headers and request.headers["If-Range"] == etag:
            begin, status = int(request.headers["Range"][6:-1]), 206
            headers["Content-Range"] = f"bytes {begin}-{len(whole) - 1}/{len(whole)}"
        self.statuses.append(status)
        pieces = [whole[begin:]] if cut is None else [whole[begin:cut], None]
        return httpx.Response(status, headers=headers, stream=Piecewise(*pieces))


async def download(transport):
    async with open_download_client(transport) as http:
        return await download_image("http://results.test/a", http, check_whole, task_id="task_1")


def check_whole(data):
    inspect_image(data)
    return data


virtual = [pytest.mark.anyio, pytest.mark.virtual_time]


class TestResuming:
    pytestmark = virtual

    async def test_interrupted_download_is_resumed(self):
        files = Files((STRONG, JPEG, HALF), (STRONG, JPEG, HALF + 100), (STRONG, JPEG, None))
        assert await download(files) == JPEG
        assert files.statuses == [200, 206, 206]
        asked = [request.headers.get("Range") for request in files.requests]
        assert asked == [None, f"bytes={HALF}-", f"bytes={HALF + 100}-"]

    @pytest.mark.parametrize(
        "files",
        [
            Files((None, JPEG, HALF), (None, JPEG, None)),
            Files((WEAK, JPEG, HALF), (WEAK, JPEG, None)),
            Files((STRONG, JPEG, HALF), (STRONG, JPEG, None), ranges=False),
            Files((STRONG, OTHER, HALF), ('"version-2"', JPEG, None)),
        ],
        ids=["no version", "a weak version", "no ranges", "a new version"],
    )
    async def test_unsafe_resume_starts_again(self, files):
        assert await download(files) == JPEG
        assert files.statuses == [200, 200]

    async def test_weak_etag_requests_no_range(self):
        files = Files((WEAK, JPEG, HALF), (WEAK, JPEG, None))
        await download(files)
        assert "Range" not in files.requests[1].headers

    @pytest.mark.parametrize(
        "second",
        [
            httpx.Response(206, headers={"Content-Range": f"bytes {HALF + 1}-9/10"}, content=b"x"),
            httpx.Response(206, headers={"Content-Range": "bytes"}, content=JPEG[HALF:]),
            httpx.Response(206, content=JPEG[HALF:]),
            httpx.Response(
                206,
                headers={"Content-Range": f"bytes {HALF}-9/10", "ETag": '"version-2"'},
                content=JPEG[HALF:],
            ),
            httpx.Response(416),
        ],
        ids=["another range", "no range", "no header", "another version", "status 416"],
    )
    async def test_wrong_range_is_discarded(self, second):
        """A range that does not continue the received bytes is not appended to them."""
        first = httpx.Response(200, headers={"ETag": STRONG}, stream=Piecewise(JPEG[:HALF], None))
        script = [first, second, httpx.Response(200, content=JPEG)]
        asked = []

        def answer(request):
            asked.append(request.headers.get("Range"))
            played = script.pop(0)
            if isinstance(played.stream, Piecewise):
                return played
            return httpx.Response(
                played.status_code, headers=played.headers, stream=Piecewise(played.content)
            )

        assert await download(httpx.MockTransport(answer)) == JPEG
        assert asked == [None, f"bytes={HALF}-", None]

    async def test_invalid_resumed_image_is_downloaded_again(self):
        old, new = picture("png"), picture("png")
        files = Files((STRONG, old, 900), (STRONG, new, None), (STRONG, new, None))
        assert await download(files) == new
        assert files.statuses == [200, 206, 200]

    async def test_error_between_attempts_keeps_received_bytes(self):
        """A 503 between two attempts does not lose the bytes of the first."""
        script = [
            httpx.Response(200, headers={"ETag": STRONG}, stream=Piecewise(JPEG[:HALF], None)),
            httpx.Response(503, headers={"Retry-After": "7"}, stream=Piecewise(b"sorry")),
            httpx.Response(
                206,
                headers={"Content-Range": f"bytes {HALF}-{len(JPEG) - 1}/{len(JPEG)}"},
                stream=Piecewise(JPEG[HALF:]),
            ),
        ]
        assert await download(httpx.MockTransport(lambda _: script.pop(0))) == JPEG


class TestTime:
    pytestmark = virtual

    async def test_slow_steady_download_succeeds(self):
        step = len(JPEG) // 8 + 1
        pieces = [p for n in range(0, len(JPEG), step) for p in (29.0, JPEG[n : n + step])]
        transport = httpx.MockTransport(lambda _: httpx.Response(200, stream=Piecewise(*pieces)))
        loop = asyncio.get_running_loop()
        began = loop.time()
        assert await download(transport) == JPEG
        assert loop.time() - began == pytest.approx(8 * 29)

    async def test_stalled_download_is_resumed_after_30_seconds(self):
        loop = asyncio.get_running_loop()
        asked = []

        def answer(request):
            asked.append((loop.time(), request.headers.get("Range")))
            if len(asked) == 1:
                pieces = [JPEG[:100], 20, JPEG[100:HALF], 9_999]
                return httpx.Response(200, headers={"ETag": STRONG}, stream=Piecewise(*pieces))
            headers = {"Content-Range": f"bytes {HALF}-{len(JPEG) - 1}/{len(JPEG)}"}
            return httpx.Response(206, headers=headers, stream=Piecewise(JPEG[HALF:]))

        assert await download(httpx.MockTransport(answer)) == JPEG
        (first, _), (second, rest) = asked
        assert 50 <= second - first <= 51
        assert rest == f"bytes={HALF}-"

    async def test_slow_drip_times_out(self):
        transport = httpx.MockTransport(
            lambda _: httpx.Response(200, stream=Piecewise(*[b"x", 29] * 99_999))
        )
        loop = asyncio.get_running_loop()
        began = loop.time()
        with pytest.raises(DownloadError, match="TimeoutError after 11 bytes"):
            await download(transport)
        assert 600 < loop.time() - began < 700
