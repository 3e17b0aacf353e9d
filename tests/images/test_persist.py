"""Results are downloaded, checked and stored once, and no secret leaks."""

import asyncio
import gzip
import hashlib

import httpx
import pytest

from prefect_flux_kontext.errors import DownloadError, InvalidImageError, StorageError
from prefect_flux_kontext.images.download import open_download_client
from prefect_flux_kontext.images.persist import persist_result
from prefect_flux_kontext.models import GenerationRequest, GenerationResult
from prefect_flux_kontext.storage.filesystem import OutputFolder
from prefect_flux_kontext.storage.names import make_safe_name
from tests.support.pictures import picture

JPEG = picture("jpeg")
HOST = "http://results.test"
LOCAL = "http://127.0.0.1"


class Host:
    """A result host as an ASGI application: a list of answers for each path; the last repeats."""

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


async def persist(host, what, output, name="cat", *, ai_mark=False):
    async with open_download_client(httpx.ASGITransport(host)) as http:
        return await persist_result(what, OutputFolder(output), http, name=name, ai_mark=ai_mark)


virtual = [pytest.mark.anyio, pytest.mark.virtual_time]


class TestOnVirtualTime:
    pytestmark = virtual

    async def test_good_result_is_stored_in_one_attempt(self, tmp_path):
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
            "flags": [],
        }
        assert (tmp_path / "cat.jpg").read_bytes() == JPEG
        assert len(host.requests) == 1

    async def test_further_images_of_a_result_are_numbered(self, tmp_path):
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
            "truncated",
            "all but a byte",
            "unrequested gzip",
        ],
    )
    async def test_wrong_response_is_retried_and_stored_once(self, wrong, tmp_path):
        host = Host(a=[wrong, wrong, ok(JPEG)])
        (stored,) = await persist(host, result("a"), tmp_path)
        assert stored.sha256 == hashlib.sha256(JPEG).hexdigest()
        assert len(host.requests) == 3
        assert [path.name for path in tmp_path.iterdir()] == ["cat.jpg"]

    async def test_missing_result_fails_and_names_the_paid_task(self, tmp_path):
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

    async def test_broken_result_fails_and_names_the_paid_task(self, tmp_path):
        host = Host(a=[ok(JPEG[:-2])])
        with pytest.raises(InvalidImageError, match="Task task_1 is paid for") as caught:
            await persist(host, result("a"), tmp_path)
        assert caught.value.task_id == "task_1"
        assert len(host.requests) == 6
        assert list(tmp_path.iterdir()) == []

    async def test_attempts_are_spread_over_seconds(self, tmp_path):
        began = asyncio.get_running_loop().time()
        with pytest.raises(DownloadError):
            await persist(Host(a=[error(404)]), result("a"), tmp_path)
        assert 5 < asyncio.get_running_loop().time() - began < 60

    async def test_retry_after_is_honoured_except_after_the_last_attempt(self, tmp_path):
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
    async def test_url_signature_is_in_no_message(self, reply, secret, tmp_path):
        with pytest.raises((DownloadError, InvalidImageError)) as caught:
            await persist(Host(a=[reply]), result("a", query=secret), tmp_path)
        assert f"{HOST}/a" in caught.value.message
        assert "s3cret" not in f"{caught.value!r} {caught.value.__cause__!r}"
        assert caught.value.__context__ is None

    async def test_password_in_a_url_is_in_no_message(self, tmp_path):
        what = GenerationResult(task_id="task_1", result_urls=["http://u:s3cret@results.test/a"])
        with pytest.raises(DownloadError) as caught:
            await persist(Host(a=[error(404)]), what, tmp_path)
        assert "s3cret" not in repr(caught.value)
        assert "http://results.test/a" in caught.value.message

    async def test_result_without_request_may_have_any_format(self, tmp_path):
        what = GenerationResult(task_id="task_1", result_urls=[f"{HOST}/a"])
        (stored,) = await persist(Host(a=[ok(picture("webp"))]), what, tmp_path)
        assert stored.format == "webp"
        assert (tmp_path / "cat.webp").exists()

    @pytest.mark.parametrize(("kind", "ending"), [("png", "png"), ("webp", "webp")])
    async def test_image_of_another_format_is_stored(self, kind, ending, tmp_path, caplog):
        """An image of another format is paid for, so it is stored, with a warning."""
        host = Host(a=[ok(picture(kind))])
        (stored,) = await persist(host, result("a", output_format="jpeg"), tmp_path)
        assert (stored.format, stored.uri) == (kind, f"file://{tmp_path}/cat.{ending}")
        assert (tmp_path / f"cat.{ending}").read_bytes() == host.answers["/a"][0][1]
        assert len(host.requests) == 1
        (warning,) = caplog.messages
        assert "task_1 was asked for a JPEG and returned a " + kind.upper() in warning

    @pytest.mark.parametrize(
        ("references", "source"),
        [
            ([], "trainedAlgorithmicMedia"),
            ([f"{HOST}/reference.jpg"], "compositeWithTrainedAlgorithmicMedia"),
        ],
    )
    async def test_label_says_how_the_image_was_made(self, references, source, tmp_path):
        what = result("a").model_copy(
            update={"request": GenerationRequest(prompt="p", image_urls=references)}
        )
        (stored,) = await persist(Host(a=[ok(JPEG)]), what, tmp_path, ai_mark=True)
        data = (tmp_path / "cat.jpg").read_bytes()
        assert f"digitalsourcetype/{source}<".encode() in data
        assert (stored.size, stored.sha256) == (len(data), hashlib.sha256(data).hexdigest())

    async def test_result_without_request_is_labelled_too(self, tmp_path):
        what = GenerationResult(task_id="task_1", result_urls=[f"{HOST}/a"])
        await persist(Host(a=[ok(JPEG)]), what, tmp_path, ai_mark=True)
        assert b"digitalsourcetype/trainedAlgorithmicMedia<" in (tmp_path / "cat.jpg").read_bytes()

    async def test_hostile_name_stays_inside_the_output(self, tmp_path):
        output = tmp_path / "out"
        (stored,) = await persist(
            Host(a=[ok(JPEG)]), result("a"), output, name=make_safe_name("../../etc/cron.d/x\0")
        )
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert stored.uri.startswith(f"file://{output}/")

    async def test_storage_error_causes_no_new_download(self, tmp_path):
        """If the image cannot be written, it is not downloaded again."""
        (tmp_path / "cat.jpg" / "in the way").mkdir(parents=True)
        host = Host(a=[ok(JPEG)])
        with pytest.raises(StorageError, match=r"cat\.jpg"):
            await persist(host, result("a"), tmp_path)
        assert len(host.requests) == 1

    async def test_result_host_gets_no_key_and_no_foreign_cookie(self, tmp_path, monkeypatch):
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
    async def test_invalid_url_is_a_download_error(self, url, tmp_path):
        what = GenerationResult(task_id="task_1", result_urls=[url])
        async with open_download_client(base_url="http://127.0.0.1") as http:
            with pytest.raises(DownloadError, match="task_1"):
                await persist_result(what, OutputFolder(tmp_path), http, name="cat")


@pytest.mark.anyio
async def test_image_of_another_task_is_not_overwritten(tmp_path):
    first, second = picture("jpeg"), picture("jpeg", size=(9, 9))
    host = Host(a=[ok(first)], b=[ok(second)])
    one, two = result("a"), result("b").model_copy(update={"task_id": "task_2"})
    (stored,) = await persist(host, one, tmp_path)
    (other,) = await persist(host, two, tmp_path)
    assert stored.uri.endswith("/cat.jpg")
    assert (tmp_path / "cat.jpg").read_bytes() == first
    assert other.uri != stored.uri
    assert sorted(path.read_bytes() for path in tmp_path.iterdir()) == sorted([first, second])
    # Each task finds its own image again.
    assert await persist(host, one, tmp_path) == [stored]
    assert await persist(host, two, tmp_path) == [other]
    assert len(list(tmp_path.iterdir())) == 2
