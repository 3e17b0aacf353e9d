"""Downloads over real connections that break, end early or never; nothing slow on the loop."""

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


async def fetched(http, url, partial=None):
    """One attempt."""
    partial = partial or _Partial()
    await _fetch(http, url, partial, is_last=True)
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

        noted(results, "decode_image")
        noted(results, "add_ai_metadata")
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
