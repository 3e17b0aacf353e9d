import asyncio
import io
import random
from contextlib import asynccontextmanager

import pytest
from PIL import Image

from prefect_flux_kontext.sandbox.references import BadReferenceError, open_image
from prefect_flux_kontext.sandbox.server import running_sandbox
from tests.sandbox.helpers import BASE, sandbox_client

pytestmark = pytest.mark.anyio


def encoded(picture, kind="PNG", **options):
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


@asynccontextmanager
async def origin(*pieces, status="200 OK", hang=False):
    """A server on loopback that answers everything with the given pieces of a body."""

    async def answer(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {status}\r\nConnection: close\r\n\r\n".encode())
        try:
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
            if hang:
                await reader.read()
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/a.png"


async def outcome(url, **settings):
    async with sandbox_client(mean=0, **settings) as sandbox:
        task_id = await sandbox.accepted(image_urls=[url])
        await sandbox.background()
        return await sandbox.data(task_id), await sandbox.bill()


async def test_the_folder_of_references_is_listed_and_served():
    async with sandbox_client() as sandbox:
        listed = (await sandbox.http.get("/references")).json()
        assert "cat.png" in {entry["name"] for entry in listed}
        for entry in listed:
            reply = await sandbox.http.get(entry["url"])
            assert reply.headers["content-type"].startswith("image/")
            open_image(reply.content)


async def test_reference_folder_serves_odd_names_and_subfolders(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a b#1.png").write_bytes(encoded(Image.new("RGB", (4, 4))))
    (tmp_path / "notes.txt").write_text("no picture, so not listed")
    async with sandbox_client(references=tmp_path) as sandbox:
        (entry,) = (await sandbox.http.get("/references")).json()
        assert entry["name"] == "deep/a b#1.png"
        assert (await sandbox.http.get(entry["url"])).status_code == 200


@pytest.mark.parametrize(
    "path", ["../secret", "%2e%2e/secret", "..%2fsecret", "inside/..%2f..%2fsecret", "link", "%00"]
)
async def test_nothing_outside_the_folder_is_served(path, tmp_path):
    folder = tmp_path / "folder"
    (folder / "inside").mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    (folder / "link").symlink_to(tmp_path / "secret")
    async with sandbox_client(references=folder) as sandbox:
        reply = await sandbox.http.get(f"/references/{path}")
        assert reply.status_code == 404
        assert "secret" not in reply.json()["data"]


@pytest.mark.parametrize("name", ["cat.png", "coffee.webp", "astronaut.jpg"])
async def test_a_reference_of_its_own_needs_no_socket(name):
    data, _ = await outcome(f"{BASE}/references/{name}")
    assert data["state"] == "success"


async def test_a_reference_from_another_server_is_fetched():
    with running_sandbox() as other:
        data, _ = await outcome(f"{other.url}/references/cat.png")
    assert data["state"] == "success"


async def test_a_reference_is_fetched_once_for_many_tasks():
    with running_sandbox() as other:
        url = f"{other.url}/references/cat.png"
        async with sandbox_client(mean=0) as sandbox:
            await sandbox.accepted(image_urls=[url])
            await sandbox.background()
            second = await sandbox.accepted("oil", image_urls=[url])
            assert (await sandbox.data(second))["state"] == "success"


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:1/nobody-listens.png",
        f"{BASE}/references/missing.png",
        "file:///etc/hostname",
        "data:image/png;base64,AAAA",
        "no url at all",
        "http://[::1",
        "",
    ],
)
async def test_unfetchable_reference_fails_the_task_and_is_billed(url):
    data, bill = await outcome(url)
    assert (data["state"], data["failCode"]) == ("failed", "INVALID_IMAGE_URL")
    assert bill["accepted"] == 1


@pytest.mark.parametrize(
    "body",
    [
        b"<html>not found</html>",
        b"",
        encoded(Image.new("RGB", (40, 40)), "GIF"),
        encoded(Image.new("RGB", (400, 400), "red"), "JPEG")[:-200],
        encoded(Image.linear_gradient("L"))[:300],
    ],
    ids=["html", "empty", "gif", "cut jpg", "cut png"],
)
async def test_a_reference_that_is_no_whole_image_fails_the_task(body):
    async with origin(body) as url:
        data, _ = await outcome(url)
    assert data["failCode"] == "INVALID_IMAGE_URL"


async def test_reference_over_10_mb_fails_the_task_early():
    megabyte = bytes(1024 * 1024)
    async with origin(*[megabyte] * 11, hang=True) as url:
        data, _ = await outcome(url)
    assert "10 MB" in data["failMsg"]


async def test_an_error_page_that_is_an_image_is_still_an_error():
    async with origin(encoded(Image.new("RGB", (9, 9))), status="404 Not Found") as url:
        data, _ = await outcome(url)
    assert data["failCode"] == "INVALID_IMAGE_URL"


@pytest.mark.virtual_time
async def test_hanging_reference_holds_a_slot_until_the_timeout():
    async with origin(b"", hang=True) as url, sandbox_client(mean=1, slots=1) as sandbox:
        task_id = await sandbox.accepted(image_urls=[url])
        await asyncio.sleep(15)
        assert (await sandbox.data(task_id))["state"] == "processing"
        assert (await sandbox.submit()).status_code == 429
        data = await sandbox.finished(task_id)
        assert data["failCode"] == "INVALID_IMAGE_URL"
        assert 20_000 <= data["costTime"] < 21_000
        await sandbox.accepted()


def test_an_image_that_unpacks_to_too_much_is_refused():
    bomb = encoded(Image.new("1", (9_000, 9_000)))
    with pytest.raises(BadReferenceError, match="pixels"):
        open_image(bomb)


def test_random_bytes_are_no_image():
    whole = bytearray(encoded(Image.linear_gradient("L"), "JPEG"))
    for seed in range(50):
        rng, spoilt = random.Random(seed), bytearray(whole)
        for _ in range(20):
            spoilt[rng.randrange(len(spoilt))] = rng.randrange(256)
        try:
            assert open_image(bytes(spoilt)).mode == "RGB"
        except BadReferenceError:
            continue


def test_a_transparent_reference_lies_on_white():
    picture = open_image(encoded(Image.new("RGBA", (3, 3), (255, 0, 0, 0))))
    assert picture.getpixel((1, 1)) == (255, 255, 255)


def test_a_photo_taken_sideways_is_put_upright():
    sideways = Image.new("RGB", (40, 20))
    exif = sideways.getexif()
    exif[0x0112] = 6
    assert open_image(encoded(sideways, "JPEG", exif=exif)).size == (20, 40)
