"""The aspect ratio `match` comes to the ratio nearest to the reference's own."""

import asyncio
import json
from contextlib import asynccontextmanager

import pytest
from PIL import Image

from prefect_flux_kontext.images.download import open_download_client
from prefect_flux_kontext.manifest.reader import Manifest
from prefect_flux_kontext.models import GenerationRequest
from prefect_flux_kontext.references.ratio import RatioMatcher, find_nearest_ratio
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from tests.support.batches import KEY, run
from tests.support.pictures import picture
from tests.support.scripted_server import ScriptedServer, html, redirect, reply

pytestmark = pytest.mark.anyio


def turned(orientation, size):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return picture(size=size, exif=exif)


def with_long_header(size):
    """A JPEG whose size stands behind 200 KB of application data."""
    data = picture(size=size)
    return data[:2] + b"".join(b"\xff\xe2\xff\xff" + bytes(65_533) for _ in range(3)) + data[2:]


def request(url, **options):
    return GenerationRequest(prompt="oil", image_urls=[url], **options)


@asynccontextmanager
async def open_matcher(base_url="http://127.0.0.1:1"):
    async with open_download_client(base_url=base_url) as http:
        yield RatioMatcher(http)


async def match(server, path, **options):
    async with open_matcher(**options) as matcher:
        return await matcher.match(request(server.url + path))


@pytest.mark.parametrize(
    ("size", "ratio"),
    [
        ((2100, 900), "21:9"),
        ((1920, 1080), "16:9"),
        ((3000, 2000), "4:3"),
        ((4032, 3024), "4:3"),
        ((1000, 1001), "1:1"),
        ((2000, 3000), "3:4"),
        ((1080, 1920), "9:16"),
        ((1, 10_000), "9:16"),
        ((10_000, 1), "21:9"),
    ],
)
def test_nearest_of_the_six_ratios_is_chosen(size, ratio):
    assert find_nearest_ratio(*size) == ratio


@pytest.mark.parametrize(
    ("content", "ratio"),
    [
        (picture("jpeg", size=(60, 80)), "3:4"),
        (picture("png", size=(160, 90)), "16:9"),
        (picture("webp", size=(90, 160)), "9:16"),
        (picture("webp", size=(100, 100), lossless=True), "1:1"),
        (turned(6, (80, 60)), "3:4"),
        (turned(8, (160, 90)), "9:16"),
        (turned(3, (80, 60)), "4:3"),
        (with_long_header((210, 90)), "21:9"),
    ],
)
async def test_shape_is_read_from_the_header(content, ratio, tmp_path):
    async with ScriptedServer(reply(200, content)) as server:
        matched = await match(server, "/a.jpg")
    assert (matched.aspect_ratio, matched.matched_ratio, matched.match_note) == (
        "match",
        ratio,
        None,
    )
    assert matched.body()["input"]["aspect_ratio"] == ratio
    (tmp_path / "a.jpg").write_bytes(content)
    assert (await RatioMatcher(None).match(request(str(tmp_path / "a.jpg")))).matched_ratio == (
        ratio
    )


async def test_only_the_header_of_a_large_image_is_read():
    content = picture("png", size=(30, 40)) + bytes(30_000_000)
    async with ScriptedServer(reply(200, content)) as server:
        matched = await match(server, "/a.png")
    assert matched.matched_ratio == "3:4"
    assert server.seen[0].headers["range"] == "bytes=0-65535"
    assert "authorization" not in server.seen[0].headers


async def test_redirect_of_a_reference_is_followed():
    async with ScriptedServer(redirect("/b"), reply(200, picture(size=(90, 160)))) as server:
        matched = await match(server, "/a")
    assert matched.matched_ratio == "9:16"


@pytest.mark.parametrize(
    ("play", "reason"),
    [
        (html(404), "HTTP 404"),
        (html(200), "it is not a JPG, PNG or WebP"),
        (reply(200, b""), "it is not a JPG, PNG or WebP"),
        (reply(200, picture()[:40]), "it is not a JPG, PNG or WebP"),
        (redirect("/again"), "TooManyRedirects"),
        (redirect("file:///etc/passwd"), "RefusedUrlError"),
        (redirect("http://169.254.169.254/a.jpg"), "RefusedUrlError"),
    ],
)
async def test_unreadable_header_sends_16_9_and_says_so(play, reason):
    async with ScriptedServer(play) as server:
        matched = await match(server, "/a.jpg?sig=canary")
    assert matched.matched_ratio == "16:9"
    assert matched.match_note == (
        f"16:9 was sent, because the reference's shape is unknown: {reason}"
    )


async def test_private_host_is_not_read_for_a_public_service():
    async with ScriptedServer(reply(200, picture())) as server:
        matched = await match(server, "/a.jpg", base_url="https://service.test")
    assert "RefusedUrlError" in matched.match_note
    assert server.connections == 0


async def test_host_is_not_asked_again_after_three_failures():
    async with ScriptedServer(html(403)) as server, open_matcher() as matcher:
        rows = [request(f"{server.url}/{n}.jpg") for n in range(20)]
        matched = await asyncio.gather(*map(matcher.match, rows))
    assert len(server.seen) == 3
    assert {each.matched_ratio for each in matched} == {"16:9"}
    assert "failed 3 times in a row" in matched[-1].match_note


async def test_reference_of_several_rows_is_read_once():
    async with ScriptedServer(reply(200, picture())) as server, open_matcher() as matcher:
        await asyncio.gather(*(matcher.match(request(server.url)) for _ in range(5)))
    assert len(server.seen) == 1


async def test_explicit_ratio_reads_nothing():
    async with ScriptedServer(html(404)) as server, open_matcher() as matcher:
        matched = await matcher.match(request(server.url, aspect_ratio="1:1"))
    assert (matched.sent_aspect_ratio, server.seen) == ("1:1", [])


async def test_match_without_a_reference_is_refused():
    with pytest.raises(ValueError, match="'match' needs a reference image"):
        GenerationRequest(prompt="a cat", aspect_ratio="match")
    assert GenerationRequest(prompt="a cat").aspect_ratio == "16:9"


@pytest.mark.parametrize("reads", [True, False])
def test_ledger_and_results_hold_word_and_ratio(reads, tmp_path, monkeypatch):
    monkeypatch.setenv("FLUX_KONTEXT_MATCH_REFERENCES", str(reads))
    with running_sandbox(SandboxSettings(mean=0.05, long_edge=16, api_key=KEY)) as sandbox:
        rows = [
            {"id": "cat", "image": f"{sandbox.url}/references/cat.png", "prompt": "oil"},
            {"id": "wide", "image": f"{sandbox.url}/references/cat.png", "prompt": "oil"}
            | {"aspect_ratio": "21:9"},
            {"id": "lost", "image": f"{sandbox.url}/references/lost.png", "prompt": "oil"},
            {"id": "text", "prompt": "oil"},
        ]
        for _ in range(2):  # the second run writes the lines from its wave files
            asyncio.run(run(sandbox, Manifest(rows), tmp_path))
            lines = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
            lines = {line["id"]: line for line in lines}
            found = {
                name: (line["aspect_ratio"], line.get("matched_ratio"), "match_note" in line)
                for name, line in lines.items()
            }
            assert found == {
                "cat": ("match", "4:3" if reads else "16:9", not reads),
                "wide": ("21:9", None, False),
                "lost": ("match", "16:9", True),
                "text": ("16:9", None, False),
            }
        sent = [record["aspect_ratio"] for record in sandbox.service.records()]
        assert sorted(sent) == sorted(["4:3" if reads else "16:9", "21:9", "16:9", "16:9"])
    note = "HTTP 404" if reads else "FLUX_KONTEXT_MATCH_REFERENCES is off"
    assert lines["lost"]["match_note"].endswith(note)
    intents = [
        json.loads(path.read_text())["request"]
        for path in (tmp_path / "_ledger" / "rows").rglob("*.intent.json")
    ]
    assert {(each["aspect_ratio"], each.get("matched_ratio")) for each in intents} >= {
        ("match", "4:3" if reads else "16:9"),
        ("21:9", None),
    }
