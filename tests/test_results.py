"""Results are fetched until they are right, checked, stored once, and never cost the key."""

import asyncio
import gzip
import hashlib
from contextlib import asynccontextmanager

import httpx
import pytest

from prefect_flux_kontext.errors import DownloadError, InvalidImageError, StorageError
from prefect_flux_kontext.models import GenerationRequest, GenerationResult
from prefect_flux_kontext.results import _fetch, download_client, persist_result
from prefect_flux_kontext.storage import OutputFolder
from tests.support.pictures import picture

JPEG = picture("jpeg")
HOST = "http://results.test"
LOCAL = "http://127.0.0.1"
LARGEST = 50 * 2**20


class Host:
    """A result host as an ASGI application: for each path a list of answers, the last repeats."""

    def __init__(self, **answers):
        self.answers = {f"/{name}": list(replies) for name, replies in answers.items()}
        self.requests = []

    async def __call__(self, scope, receive, send):
        self.requests.append(scope)
        replies = self.answers[scope["path"]]
        status, body, headers = replies.pop(0) if len(replies) > 1 else replies[0]
        headers = [(name.lower().encode(), text.encode()) for name, text in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def ok(body):
    return 200, body, {}


def error(status, **headers):
    return status, b"<html>sorry</html>", {key.replace("_", "-"): v for key, v in headers.items()}


def result(*paths, output_format="jpeg", query=""):
    return GenerationResult(
        task_id="task_1",
        result_urls=[f"{HOST}/{path}{query}" for path in paths],
        request=GenerationRequest(prompt="p", output_format=output_format),
    )


async def persist(host, what, output, name="cat"):
    async with download_client(httpx.ASGITransport(host)) as http:
        return await persist_result(what, OutputFolder(output), http, name=name)


virtual = [pytest.mark.anyio, pytest.mark.virtual_time]


class TestOnVirtualTime:
    pytestmark = virtual

    async def test_a_good_result_is_stored_and_described_at_the_first_try(self, tmp_path):
        host = Host(a=[ok(JPEG)])
        (stored,) = await persist(host, result("a"), tmp_path)
        assert stored.model_dump() == {
            "uri": f"file://{tmp_path}/cat.jpg",
            "task_id": "task_1",
            "format": "jpeg",
            "size": len(JPEG),
            "sha256": hashlib.sha256(JPEG).hexdigest(),
            "width": 96,
            "height": 72,
        }
        assert (tmp_path / "cat.jpg").read_bytes() == JPEG
        assert len(host.requests) == 1

    async def test_further_images_of_a_result_are_numbered_in_order(self, tmp_path):
        pictures = [picture("jpeg", size=(size, 64)) for size in (64, 80, 96)]
        host = Host(**{name: [ok(data)] for name, data in zip("abc", pictures, strict=True)})
        stored = await persist(host, result("a", "b", "c"), tmp_path)
        assert [image.uri.rpartition("/")[2] for image in stored] == [
            "cat.jpg",
            "cat~2.jpg",
            "cat~3.jpg",
        ]
        assert [image.width for image in stored] == [64, 80, 96]
        assert {path.name for path in tmp_path.iterdir()} == {"cat.jpg", "cat~2.jpg", "cat~3.jpg"}

    @pytest.mark.parametrize(
        "wrong",
        [
            error(404),
            error(403),
            error(500),
            error(204),
            error(206),
            error(304),
            ok(b""),
            ok(b"<html>502 Bad Gateway</html>"),
            ok(JPEG[: len(JPEG) // 2]),
            ok(JPEG[:-1]),
            ok(picture("png")),
            (200, gzip.compress(JPEG), {"Content-Encoding": "gzip"}),
        ],
        ids=[
            "404",
            "403",
            "500",
            "204",
            "206",
            "304",
            "empty",
            "HTML",
            "half of it",
            "all but a byte",
            "another kind",
            "squeezed unasked",
        ],
    )
    async def test_what_is_wrong_at_first_is_fetched_again_and_stored_once(self, wrong, tmp_path):
        host = Host(a=[wrong, wrong, ok(JPEG)])
        (stored,) = await persist(host, result("a"), tmp_path)
        assert stored.sha256 == hashlib.sha256(JPEG).hexdigest()
        assert len(host.requests) == 3
        assert [path.name for path in tmp_path.iterdir()] == ["cat.jpg"]

    async def test_a_result_that_stays_away_is_given_up_with_the_paid_task_named(self, tmp_path):
        host = Host(a=[error(404)])
        with pytest.raises(DownloadError) as caught:
            await persist(host, result("a"), tmp_path)
        assert len(host.requests) == 6
        assert caught.value.task_id == "task_1"
        assert caught.value.retryable
        assert "Task task_1 is paid for" in caught.value.message
        assert f"{HOST}/a cannot be stored after 6 attempts" in caught.value.message
        assert "HTTP 404" in caught.value.message
        assert list(tmp_path.iterdir()) == []

    async def test_a_result_that_stays_broken_is_given_up_with_the_paid_task_named(self, tmp_path):
        host = Host(a=[ok(JPEG[:-2])])
        with pytest.raises(InvalidImageError, match="Task task_1 is paid for") as caught:
            await persist(host, result("a"), tmp_path)
        assert caught.value.task_id == "task_1"
        assert len(host.requests) == 6
        assert list(tmp_path.iterdir()) == []

    async def test_the_tries_are_spread_over_seconds_not_fired_at_once(self, tmp_path):
        began = asyncio.get_running_loop().time()
        with pytest.raises(DownloadError):
            await persist(Host(a=[error(404)]), result("a"), tmp_path)
        assert 5 < asyncio.get_running_loop().time() - began < 60

    async def test_retry_after_is_waited_for_but_not_once_it_is_given_up(self, tmp_path):
        loop = asyncio.get_running_loop()
        began = loop.time()
        host = Host(a=[error(503, Retry_After="100"), ok(JPEG)])
        await persist(host, result("a"), tmp_path)
        assert 100 < loop.time() - began < 105

        began = loop.time()
        with pytest.raises(DownloadError):
            await persist(Host(a=[error(503, Retry_After="100")]), result("a"), tmp_path)
        assert 500 < loop.time() - began < 540

    @pytest.mark.parametrize("reply", [error(404), ok(b"<html>")], ids=["download", "content"])
    @pytest.mark.parametrize(
        "secret", ["?sig=s3cret", "#s3cret", "?a=1&X-Amz-Signature=s3cret?x#y"]
    )
    async def test_what_signs_a_url_is_in_no_message(self, reply, secret, tmp_path):
        with pytest.raises((DownloadError, InvalidImageError)) as caught:
            await persist(Host(a=[reply]), result("a", query=secret), tmp_path)
        assert f"{HOST}/a" in caught.value.message
        assert "s3cret" not in f"{caught.value!r} {caught.value.__cause__!r}"
        assert caught.value.__context__ is None

    async def test_a_password_in_a_url_is_in_no_message(self, tmp_path):
        what = GenerationResult(task_id="task_1", result_urls=["http://u:s3cret@results.test/a"])
        with pytest.raises(DownloadError) as caught:
            await persist(Host(a=[error(404)]), what, tmp_path)
        assert "s3cret" not in repr(caught.value)
        assert "http://results.test/a" in caught.value.message

    async def test_without_its_request_a_result_may_be_of_any_kind(self, tmp_path):
        what = GenerationResult(task_id="task_1", result_urls=[f"{HOST}/a"])
        (stored,) = await persist(Host(a=[ok(picture("webp"))]), what, tmp_path)
        assert stored.format == "webp"
        assert (tmp_path / "cat.webp").exists()

    async def test_a_hostile_name_stays_inside_the_output(self, tmp_path):
        output = tmp_path / "out"
        (stored,) = await persist(
            Host(a=[ok(JPEG)]), result("a"), output, name="../../etc/cron.d/x\0"
        )
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert stored.uri.startswith(f"file://{output}/")

    async def test_an_output_that_refuses_is_not_tried_by_downloading_again(self, tmp_path):
        (tmp_path / "cat.jpg" / "in the way").mkdir(parents=True)
        host = Host(a=[ok(JPEG)])
        with pytest.raises(StorageError, match=r"cat\.jpg"):
            await persist(host, result("a"), tmp_path)
        assert len(host.requests) == 1

    async def test_the_result_host_gets_no_key_and_no_cookie_of_another(
        self, tmp_path, monkeypatch
    ):
        monkeypatch.setenv("FLUX_KONTEXT_API_KEY", "canary-key")
        host = Host(a=[(200, JPEG, {"Set-Cookie": "a=1; Domain=other.test"})], b=[ok(JPEG)])
        await persist(host, result("a", "b"), tmp_path)
        for request in host.requests:
            assert "canary-key" not in str(request)
            assert {name for name, _ in request["headers"]} <= {
                b"host",
                b"accept",
                b"accept-encoding",
                b"connection",
                b"user-agent",
            }

    @pytest.mark.parametrize(
        "url",
        [
            "",
            "/relative",
            "file:///etc/passwd",
            "data:image/png;base64,AAAA",
            "http://[::1",
            "http://127.0.0.1:1/\0",
        ],
    )
    async def test_a_url_that_is_none_is_a_download_error(self, url, tmp_path):
        what = GenerationResult(task_id="task_1", result_urls=[url])
        async with download_client() as http:
            with pytest.raises(DownloadError, match="task_1"):
                await persist_result(what, OutputFolder(tmp_path), http, name="cat")


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
        async with raw_server(head, forever=True) as url, download_client(base_url=LOCAL) as http:
            with pytest.raises(DownloadError, match=f"larger than {LARGEST:,} bytes"):
                await _fetch(http, url, last=True)

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
        answer = (head, JPEG if head else b"")
        async with raw_server(*answer) as url, download_client(base_url=LOCAL) as http:
            with pytest.raises(DownloadError, match=r"RemoteProtocolError|ReadError"):
                await _fetch(http, url, last=True)

    async def test_nobody_there_is_a_download_error(self):
        async with raw_server() as url:
            pass
        async with download_client(base_url=LOCAL) as http:
            with pytest.raises(DownloadError, match="ConnectError"):
                await _fetch(http, url, last=True)

    async def test_redirects_are_followed_but_not_for_ever(self):
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(JPEG)
        async with raw_server(head, JPEG) as there, download_client(base_url=LOCAL) as http:
            moved = b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: %b\r\n\r\n"
            async with raw_server(moved % there.encode()) as url:
                assert await _fetch(http, url, last=True) == JPEG
            async with raw_server(moved % b"/again") as url:
                with pytest.raises(DownloadError, match="TooManyRedirects"):
                    await _fetch(http, url, last=True)

    async def test_a_port_that_is_none_is_a_download_error(self):
        async with download_client(base_url=LOCAL) as http:
            with pytest.raises(DownloadError):
                await _fetch(http, "http://127.0.0.1:-1/", last=True)
