"""Downloads over loopback connections that fail; slow work stays off the event loop."""

import asyncio
import functools
import threading
import time
from contextlib import asynccontextmanager

import pytest
from blockbuster import BlockingError, blockbuster_ctx

from prefect_flux_kontext.errors import DownloadError
from prefect_flux_kontext.images import persist
from prefect_flux_kontext.images.download import _fetch, _PartialDownload, open_download_client
from prefect_flux_kontext.images.persist import persist_result
from prefect_flux_kontext.models import GenerationResult
from prefect_flux_kontext.storage import filesystem
from prefect_flux_kontext.storage.filesystem import OutputFolder
from tests.support.pictures import picture
from tests.support.scripted_server import ScriptedServer, half_a_reply, reply

JPEG = picture("jpeg")

HALF = len(JPEG) // 2

local_client = functools.partial(open_download_client, base_url="http://127.0.0.1")

MAX_BYTES = 50 * 2**20

STRONG = '"version-1"'


async def fetch_once(http, url, partial=None):
    """Run one attempt and return the data received."""
    partial = partial or _PartialDownload()
    await _fetch(http, url, partial, last=True)
    return bytes(partial.data)


@asynccontextmanager
async def raw_server(*pieces, forever=False):
    """Run a server that sends each connection the same bytes, then closes it."""

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


class TestConnections:
    pytestmark = pytest.mark.anyio

    async def test_endless_body_ends_at_the_limit(self):
        head = b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\n\r\n"
        async with (
            raw_server(head, forever=True) as url,
            local_client() as http,
        ):
            with pytest.raises(DownloadError, match=f"larger than {MAX_BYTES:,} bytes"):
                await fetch_once(http, url)

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
    async def test_broken_connection_is_a_download_error(self, head):
        async with (
            raw_server(head, JPEG if head else b"") as url,
            local_client() as http,
        ):
            with pytest.raises(DownloadError, match=r"RemoteProtocolError|ReadError"):
                await fetch_once(http, url)

    async def test_refused_connection_is_a_download_error(self):
        async with raw_server() as url:
            pass
        async with local_client() as http:
            with pytest.raises(DownloadError, match="ConnectError"):
                await fetch_once(http, url)

    async def test_redirects_are_followed_up_to_a_limit(self):
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(JPEG)
        async with (
            raw_server(head, JPEG) as there,
            local_client() as http,
        ):
            moved = b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: %b\r\n\r\n"
            async with raw_server(moved % there.encode()) as url:
                assert await fetch_once(http, url) == JPEG
            async with raw_server(moved % b"/again") as url:
                with pytest.raises(DownloadError, match="TooManyRedirects"):
                    await fetch_once(http, url)

    async def test_invalid_port_is_a_download_error(self):
        async with local_client() as http:
            with pytest.raises(DownloadError):
                await fetch_once(http, "http://127.0.0.1:-1/")

    async def test_broken_connection_is_resumed(self):
        rest = reply(206, JPEG[HALF:], content_range=f"bytes {HALF}-{len(JPEG) - 1}/{len(JPEG)}")
        partial = _PartialDownload()
        async with (
            ScriptedServer(half_a_reply(200, JPEG, etag=STRONG), rest) as server,
            local_client() as http,
        ):
            with pytest.raises(DownloadError, match=f"after {HALF:,} bytes"):
                await fetch_once(http, server.url, partial)
            assert await fetch_once(http, server.url, partial) == JPEG
            assert server.seen[1].headers["range"] == f"bytes={HALF}-"
            assert server.seen[1].headers["if-range"] == STRONG


class TestEventLoop:
    pytestmark = pytest.mark.anyio

    async def test_slow_work_runs_in_threads(self, tmp_path, monkeypatch):
        threads = {}

        def record_thread(module, name):
            real = getattr(module, name)

            def call(*args):
                threads[name] = threading.current_thread()
                return real(*args)

            monkeypatch.setattr(module, name, call)

        record_thread(persist, "decode_image")
        record_thread(persist, "add_ai_metadata")
        record_thread(filesystem, "create_file")
        async with (
            ScriptedServer(reply(200, JPEG)) as server,
            local_client() as http,
        ):
            result = GenerationResult(task_id="task_1", result_urls=[server.url])
            output = OutputFolder(tmp_path)
            # The first request reads certificates and imports modules.
            await persist_result(result, output, http, name="first", key="k" * 32)
            with blockbuster_ctx() as detector:
                # The coverage collector takes a lock of its own.
                lock = detector.functions["threading.Lock.acquire"]
                lock.can_block_in("collector.py", "lock_data")
                with pytest.raises(BlockingError):
                    time.sleep(0)  # noqa: ASYNC251 - checks that the detector works
                await persist_result(result, output, http, name="second", key="k" * 32)
        assert len(threads) == 3
        assert threading.main_thread() not in threads.values()
