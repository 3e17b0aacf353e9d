"""Downloads over real connections that break or never end; nothing blocks the event loop."""

import asyncio
import functools
import threading
import time
from contextlib import asynccontextmanager

import pytest
from blockbuster import BlockingError, blockbuster_ctx

from prefect_flux_kontext.errors import DownloadError
from prefect_flux_kontext.images import persist as results
from prefect_flux_kontext.images.download import _fetch, _Partial, open_download_client
from prefect_flux_kontext.images.persist import persist_result
from prefect_flux_kontext.models import GenerationResult
from prefect_flux_kontext.storage import filesystem as storage
from prefect_flux_kontext.storage.filesystem import OutputFolder
from tests.support.pictures import picture
from tests.support.scripted_server import ScriptedServer, half_a_reply, reply

JPEG = picture("jpeg")

HALF = len(JPEG) // 2

local_client = functools.partial(open_download_client, base_url="http://127.0.0.1")

LARGEST = 50 * 2**20

STRONG = '"version-1"'


async def fetch(http, url, partial=None):
    """Make one attempt."""
    partial = partial or _Partial()
    await _fetch(http, url, partial, is_last=True)
    return bytes(partial.data)


@asynccontextmanager
async def raw_server(*pieces, is_endless=False):
    """A server that sends the same bytes on each connection and closes it."""

    async def answer(reader, writer):
        try:
            await reader.readuntil(b"\r\n\r\n")
            for piece in pieces:
                writer.write(piece)
            while is_endless:
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

    async def test_endless_body_stops_at_the_size_limit(self):
        head = b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\n\r\n"
        async with (
            raw_server(head, is_endless=True) as url,
            local_client() as http,
        ):
            with pytest.raises(DownloadError, match=f"larger than {LARGEST:,} bytes"):
                await fetch(http, url)

    @pytest.mark.parametrize(
        "head",
        [
            f"HTTP/1.1 200 OK\r\nContent-Length: {len(JPEG) + 1}\r\n\r\n".encode(),
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n" % (len(JPEG) + 1),
            b"no HTTP at all\r\n\r\n",
            b"",
        ],
        ids=["shorter than promised", "chunk unfinished", "not HTTP", "nothing"],
    )
    async def test_broken_connection_is_a_download_error(self, head):
        async with (
            raw_server(head, JPEG if head else b"") as url,
            local_client() as http,
        ):
            with pytest.raises(DownloadError, match=r"RemoteProtocolError|ReadError"):
                await fetch(http, url)

    async def test_refused_connection_is_a_download_error(self):
        async with raw_server() as url:
            pass
        async with local_client() as http:
            with pytest.raises(DownloadError, match="ConnectError"):
                await fetch(http, url)

    async def test_redirects_are_followed_up_to_a_limit(self):
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(JPEG)
        async with (
            raw_server(head, JPEG) as there,
            local_client() as http,
        ):
            moved = b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: %b\r\n\r\n"
            async with raw_server(moved % there.encode()) as url:
                assert await fetch(http, url) == JPEG
            async with raw_server(moved % b"/again") as url:
                with pytest.raises(DownloadError, match="TooManyRedirects"):
                    await fetch(http, url)

    async def test_invalid_port_is_a_download_error(self):
        async with local_client() as http:
            with pytest.raises(DownloadError):
                await fetch(http, "http://127.0.0.1:-1/")

    async def test_broken_real_connection_is_resumed(self):
        rest = reply(206, JPEG[HALF:], content_range=f"bytes {HALF}-{len(JPEG) - 1}/{len(JPEG)}")
        partial = _Partial()
        async with (
            ScriptedServer(half_a_reply(200, JPEG, etag=STRONG), rest) as server,
            local_client() as http,
        ):
            with pytest.raises(DownloadError, match=f"after {HALF:,} bytes"):
                await fetch(http, server.url, partial)
            assert await fetch(http, server.url, partial) == JPEG
            assert server.seen[1].headers["range"] == f"bytes={HALF}-"
            assert server.seen[1].headers["if-range"] == STRONG


class TestTheLoop:
    pytestmark = pytest.mark.anyio

    async def test_persisting_does_not_block_the_event_loop(self, tmp_path, monkeypatch):
        ran = {}

        def record_thread(module, name):
            real = getattr(module, name)

            def call(*args):
                ran[name] = threading.current_thread()
                return real(*args)

            monkeypatch.setattr(module, name, call)

        record_thread(results, "decode_image")
        record_thread(results, "add_ai_metadata")
        record_thread(storage, "create_file")
        async with (
            ScriptedServer(reply(200, JPEG)) as server,
            local_client() as http,
        ):
            what = GenerationResult(task_id="task_1", result_urls=[server.url])
            output = OutputFolder(tmp_path)
            # The first request of a process reads certificates and modules.
            await persist_result(what, output, http, name="first", key="k" * 32)
            with blockbuster_ctx() as detector:
                # The coverage tool has a lock of its own.
                lock = detector.functions["threading.Lock.acquire"]
                lock.can_block_in("collector.py", "lock_data")
                with pytest.raises(BlockingError):
                    time.sleep(0)  # noqa: ASYNC251 - checks that the detector works
                await persist_result(what, output, http, name="second", key="k" * 32)
        assert len(ran) == 3
        assert threading.main_thread() not in ran.values()
