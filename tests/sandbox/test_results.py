import asyncio
import io

import pytest
from PIL import Image

from tests.sandbox.helpers import BASE, result_url, sandbox_client

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

CAT = f"{BASE}/references/cat.png"


@pytest.mark.parametrize(
    ("ratio", "size"),
    [
        ("21:9", (126, 54)),
        ("16:9", (126, 71)),
        ("4:3", (126, 94)),
        ("1:1", (126, 126)),
        ("3:4", (94, 126)),
        ("9:16", (71, 126)),
    ],
)
@pytest.mark.parametrize("urls", [[], [CAT]], ids=["text", "image"])
async def test_a_result_has_the_aspect_ratio_and_long_edge_asked_for(ratio, size, urls):
    async with sandbox_client(long_edge=126) as sandbox:
        task_id = await sandbox.accepted(aspect_ratio=ratio, image_urls=urls)
        reply = await sandbox.picture(task_id)
        picture = Image.open(io.BytesIO(reply.content))
        assert (picture.size, picture.format, picture.mode) == (size, "JPEG", "RGB")
        assert reply.headers["content-type"] == "image/jpeg"


async def test_a_png_is_a_png():
    async with sandbox_client() as sandbox:
        reply = await sandbox.picture(await sandbox.accepted(output_format="png"))
        assert Image.open(io.BytesIO(reply.content)).format == "PNG"
        assert reply.headers["content-type"] == "image/png"


async def test_the_same_inputs_give_the_same_bytes_in_another_sandbox():
    pictures = set()
    for _ in range(2):
        async with sandbox_client() as sandbox:
            task_id = await sandbox.accepted("watercolour", image_urls=[CAT])
            pictures.add((await sandbox.picture(task_id)).content)
    assert len(pictures) == 1


async def test_a_result_can_be_the_reference_of_the_next_task():
    async with sandbox_client() as sandbox:
        first = await sandbox.finished(await sandbox.accepted("oil", image_urls=[CAT]))
        second = await sandbox.accepted("pencil", image_urls=[result_url(first)])
        assert (await sandbox.picture(second)).status_code == 200


async def test_concurrent_downloads_render_once():
    async with sandbox_client() as sandbox:
        url = result_url(await sandbox.finished(await sandbox.accepted()))
        replies = await asyncio.gather(*(sandbox.http.get(url) for _ in range(20)))
        assert len({reply.content for reply in replies}) == 1


async def test_a_result_is_not_there_before_the_task_has_ended():
    async with sandbox_client(mean=30, spread=0) as sandbox:
        task_id = await sandbox.accepted()
        assert (await sandbox.http.get(f"/results/{task_id}/1.jpg")).status_code == 404
        await asyncio.sleep(31)
        assert (await sandbox.http.get(f"/results/{task_id}/1.jpg")).status_code == 200


async def test_a_failed_task_and_a_wrong_name_have_no_result():
    async with sandbox_client(mean=0) as sandbox:
        failed = await sandbox.accepted("nsfw")
        good = await sandbox.accepted()
        for path in (f"{failed}/1.jpg", f"{good}/2.jpg", f"{good}/1.png", "task_x/1.jpg"):
            assert (await sandbox.http.get(f"/results/{path}")).status_code == 404


async def test_a_result_expires():
    async with sandbox_client(mean=30, spread=0, result_lifetime=3_600) as sandbox:
        url = result_url(await sandbox.finished(await sandbox.accepted()))
        await asyncio.sleep(3_590)
        assert (await sandbox.http.get(url)).status_code == 200
        await asyncio.sleep(20)
        assert (await sandbox.http.get(url)).status_code == 403


async def test_a_result_needs_no_key():
    async with sandbox_client() as sandbox:
        url = result_url(await sandbox.finished(await sandbox.accepted()))
        del sandbox.http.headers["Authorization"]
        assert (await sandbox.http.get(url)).status_code == 200


async def test_lost_reference_is_reported(tmp_path):
    file = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(file)
    async with sandbox_client(references=tmp_path) as sandbox:
        task_id = await sandbox.accepted(image_urls=[f"{BASE}/references/a.png"])
        url = result_url(await sandbox.finished(task_id))
        file.unlink()
        sandbox.sandbox._references.clear()
        assert (await sandbox.http.get(url)).status_code == 502
