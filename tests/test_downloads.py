"""An image is fetched until it is whole, gone on with where that is safe, and never for ever."""

import asyncio
import functools
import threading
import time
from contextlib import asynccontextmanager

import httpx
import pytest
from blockbuster import BlockingError, blockbuster_ctx

from prefect_flux_kontext import downloads, results, storage
from prefect_flux_kontext.downloads import _fetch, _Partial, download_client, download_image
from prefect_flux_kontext.errors import DownloadError
from prefect_flux_kontext.images import inspect_image
from prefect_flux_kontext.models import GenerationResult
from prefect_flux_kontext.results import persist_result
from prefect_flux_kontext.storage import OutputFolder
from tests.support.pictures import picture
from tests.support.scripted_server import ScriptedServer, half_a_reply, reply

JPEG, OTHER = picture("jpeg"), picture("jpeg", size=(90, 70))
HALF = len(JPEG) // 2
local_client = functools.partial(download_client, base_url="http://127.0.0.1")
LARGEST = 50 * 2**20
STRONG, WEAK = '"version-1"', 'W/"version-1"'


class Piecewise(httpx.AsyncByteStream):
    """A body that comes in pieces; a number is a pause in seconds, None the end of the line."""

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
    """A server of one file that plays its answers in order, the last for ever.

    An answer is (etag or None, pieces); for a request with a range it is served from there on,
    as long as the version is the one that the client has.
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
    async with download_client(transport) as http:
        data, image = await download_image("http://results.test/a", http, task_id="task_1")
    assert image == inspect_image(data)
    return data


virtual = [pytest.mark.anyio, pytest.mark.virtual_time]


class TestResuming:
    pytestmark = virtual

    async def test_a_download_that_was_cut_goes_on_where_it_ended(self):
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
    async def test_where_that_is_not_safe_it_begins_anew(self, files):
        assert await download(files) == JPEG
        assert files.statuses == [200, 200]

    async def test_without_a_strong_version_no_range_is_asked_for(self):
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
        ids=["another place", "no place", "not said", "another version", "not possible"],
    )
    async def test_a_part_that_is_not_the_one_asked_for_is_not_put_to_the_first(self, second):
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

    async def test_parts_that_make_no_image_are_thrown_away_together(self):
        old, new = picture("png"), picture("png")
        files = Files((STRONG, old, 900), (STRONG, new, None), (STRONG, new, None))
        assert await download(files) == new
        assert files.statuses == [200, 206, 200]

    async def test_trouble_between_two_parts_costs_nothing_of_the_first(self):
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

    async def test_a_slow_download_that_keeps_coming_is_waited_for(self):
        step = len(JPEG) // 8 + 1
        pieces = [p for n in range(0, len(JPEG), step) for p in (29.0, JPEG[n : n + step])]
        transport = httpx.MockTransport(lambda _: httpx.Response(200, stream=Piecewise(*pieces)))
        loop = asyncio.get_running_loop()
        began = loop.time()
        assert await download(transport) == JPEG
        assert loop.time() - began == pytest.approx(8 * 29)

    async def test_after_30_seconds_without_a_byte_it_is_asked_again_for_the_rest(self):
        loop = asyncio.get_running_loop()
        asked = []

        def answer(request):
            asked.append((loop.time(), request.headers.get("Range")))
            if len(asked) == 1:
                pieces = [JPEG[:100], 20, JPEG[100:HALF], 9_999]
                return httpx.Response(200, headers={"ETag": STRONG}, stream=Piecewise(*pieces))
            told = {"Content-Range": f"bytes {HALF}-{len(JPEG) - 1}/{len(JPEG)}"}
            return httpx.Response(206, headers=told, stream=Piecewise(JPEG[HALF:]))

        assert await download(httpx.MockTransport(answer)) == JPEG
        (first, _), (second, rest) = asked
        assert 50 <= second - first <= 51
        assert rest == f"bytes={HALF}-"

    async def test_a_drip_that_never_stalls_has_its_end_too(self):
        transport = httpx.MockTransport(
            lambda _: httpx.Response(200, stream=Piecewise(*[b"x", 29] * 99_999))
        )
        loop = asyncio.get_running_loop()
        began = loop.time()
        with pytest.raises(DownloadError, match="TimeoutError after 11 bytes"):
            await download(transport)
        assert 1_800 < loop.time() - began < 1_900


async def fetched(http, url, partial=None):
    """One attempt."""
    partial = partial or _Partial()
    await _fetch(http, url, partial, last=True)
    return bytes(partial.data)


@asynccontextmanager
async def raw_server(*pieces, forever=False):
    """A server that answers each connection with the same bytes, then hangs up."""

    async def answer(reader, writer):
        try:
            await reader.readuntil(b"\r\n\r\n")
            for piece in pieces:
                writer.write(piece)
            while forever:
                writer.write(bytes(2**20))
                await writer.drain()
            await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


class TestOverRealConnections:
    pytestmark = pytest.mark.anyio

    async def test_an_endless_body_is_cut_at_the_cap(self):
        head = b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\n\r\n"
        async with (
            raw_server(head, forever=True) as url,
            local_client() as http,
        ):
            with pytest.raises(DownloadError, match=f"larger than {LARGEST:,} bytes"):
                await fetched(http, url)

    @pytest.mark.parametrize(
        "head",
        [
            f"HTTP/1.1 200 OK\r\nContent-Length: {len(JPEG) + 1}\r\n\r\n".encode(),
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n" % (len(JPEG) + 1),
            b"no HTTP at all\r\n\r\n",
            b"",
        ],
        ids=["shorter than promised", "chunk unfinished", "no HTTP", "nothing"],
    )
    async def test_a_connection_that_breaks_is_a_download_error(self, head):
        async with (
            raw_server(head, JPEG if head else b"") as url,
            local_client() as http,
        ):
            with pytest.raises(DownloadError, match=r"RemoteProtocolError|ReadError"):
                await fetched(http, url)

    async def test_nobody_there_is_a_download_error(self):
        async with raw_server() as url:
            pass
        async with local_client() as http:
            with pytest.raises(DownloadError, match="ConnectError"):
                await fetched(http, url)

    async def test_redirects_are_followed_but_not_for_ever(self):
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(JPEG)
        async with (
            raw_server(head, JPEG) as there,
            local_client() as http,
        ):
            moved = b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: %b\r\n\r\n"
            async with raw_server(moved % there.encode()) as url:
                assert await fetched(http, url) == JPEG
            async with raw_server(moved % b"/again") as url:
                with pytest.raises(DownloadError, match="TooManyRedirects"):
                    await fetched(http, url)

    async def test_a_port_that_is_none_is_a_download_error(self):
        async with local_client() as http:
            with pytest.raises(DownloadError):
                await fetched(http, "http://127.0.0.1:-1/")

    async def test_a_real_connection_that_broke_is_gone_on_from(self):
        rest = reply(206, JPEG[HALF:], content_range=f"bytes {HALF}-{len(JPEG) - 1}/{len(JPEG)}")
        partial = _Partial()
        async with (
            ScriptedServer(half_a_reply(200, JPEG, etag=STRONG), rest) as server,
            local_client() as http,
        ):
            with pytest.raises(DownloadError, match=f"after {HALF:,} bytes"):
                await fetched(http, server.url, partial)
            assert await fetched(http, server.url, partial) == JPEG
            assert server.seen[1].headers["range"] == f"bytes={HALF}-"
            assert server.seen[1].headers["if-range"] == STRONG


class TestTheLoop:
    pytestmark = pytest.mark.anyio

    async def test_nothing_that_takes_time_is_done_on_the_event_loop(self, tmp_path, monkeypatch):
        ran = {}

        def noted(module, name):
            real = getattr(module, name)

            def call(*args):
                ran[name] = threading.current_thread()
                return real(*args)

            monkeypatch.setattr(module, name, call)

        noted(downloads, "inspect_image")
        noted(results, "ai_marked")
        noted(storage, "create_file")
        async with (
            ScriptedServer(reply(200, JPEG)) as server,
            local_client() as http,
        ):
            what = GenerationResult(task_id="task_1", result_urls=[server.url])
            output = OutputFolder(tmp_path)
            # Certificates and modules are read once in a process, at the first request.
            await persist_result(what, output, http, name="first", key="k" * 32)
            with blockbuster_ctx() as detector:
                # What counts the lines that a test runs has a lock of its own.
                lock = detector.functions["threading.Lock.acquire"]
                lock.can_block_in("collector.py", "lock_data")
                with pytest.raises(BlockingError):
                    time.sleep(0)  # noqa: ASYNC251 - to see that it watches
                await persist_result(what, output, http, name="second", key="k" * 32)
        assert len(ran) == 3
        assert threading.main_thread() not in ran.values()
