"""The live page: what it shows while a batch runs, and who may read it and post verdicts."""

import asyncio
import json

import httpx
import pytest

from prefect_flux_kontext.batch.watching import WatchedOutput
from prefect_flux_kontext.cli import main
from prefect_flux_kontext.cli.watch import create_app
from prefect_flux_kontext.ledger.heartbeat import keep_heartbeat
from prefect_flux_kontext.ledger.ledger import Ledger
from prefect_flux_kontext.ledger.store import open_ledger_store
from prefect_flux_kontext.ledger.waves import OpenWave, open_wave
from prefect_flux_kontext.manifest.row import make_row
from prefect_flux_kontext.models import StoredImage
from prefect_flux_kontext.report.results import (
    encode_line,
    open_results_store,
    write_part,
    write_run_plan,
)
from prefect_flux_kontext.report.thumbnails import image_thumbnail_name
from prefect_flux_kontext.report.verdicts import Verdict, Verdicts
from prefect_flux_kontext.storage.filesystem import OutputFolder
from tests.support.galleries import failed, line
from tests.support.pictures import picture
from tests.support.s3 import s3_server

TOKEN = "the-token-of-the-tests"


@pytest.fixture(params=["disk", "s3"])
def output(request, tmp_path):
    if request.param == "disk":
        (tmp_path / "out").mkdir()
        yield OutputFolder(str(tmp_path / "out"))
        return
    with s3_server() as (url, _):
        yield OutputFolder(f"{url}/{tmp_path.name}/out")


@pytest.fixture
def local(tmp_path):
    (tmp_path / "out").mkdir()
    return OutputFolder(str(tmp_path / "out"))


def client_of(output, host="127.0.0.1:8000"):
    transport = httpx.ASGITransport(create_app(output, TOKEN))
    return httpx.AsyncClient(transport=transport, base_url=f"http://{host}/{TOKEN}/")


async def write_results(output, lines):
    await output.write("results.jsonl", "".join(map(encode_line, lines)).encode())


def listed(output):
    return sorted(output.fs.find(output.root))


@pytest.mark.anyio
async def test_rows_appear_while_their_wave_runs(output):
    """From the records of the rows in progress, before any part of the results exists."""
    store = open_ledger_store(output)
    async with keep_heartbeat(store) as heartbeat:
        ledger = Ledger(store, heartbeat.owner, {"pro": 0.03})
        rows = [make_row(n, {"id": f"r{n}", "prompt": f"p{n}"}) for n in range(3)]
        wave = OpenWave(name="a-1", owner=heartbeat.owner, keys=[row.key for row in rows])
        await open_wave(store, wave)
        await write_run_plan(open_results_store(output), heartbeat.owner, 3)
        watched = WatchedOutput(output, 100)
        await watched.refresh()
        assert watched.rows == []
        for row in rows[:2]:
            entry = await ledger.claim(row, await ledger.read(row.key))
            entry = await ledger.record_accepted(entry, f"task-{row.id}")
        await watched.refresh()
        assert [(row["id"], row["state"]) for row in watched.rows] == [
            ("r0", "outstanding"),
            ("r1", "outstanding"),
        ]
        image = StoredImage(
            uri=output.uri("r1.jpg"),
            task_id="t",
            format="jpeg",
            size=9,
            sha256="0" * 64,
            width=4,
            height=3,
        )
        await ledger.record_stored(entry, ["r1.jpg"], [image])
        before = listed(output)
        await watched.refresh()
        assert listed(output) == before  # it only reads
        changes = watched.changes(2)
    assert changes["at"] == [1]
    assert changes["rows"]["columns"]["file"] == ["r1.jpg"]
    assert changes["progress"]["done"] == 1
    assert changes["progress"]["rows"] == 3
    assert changes["progress"]["running"] is True
    assert changes["statistics"]["costUsd"] == 0.06


@pytest.mark.anyio
async def test_parts_and_merged_results_are_read_once(output, monkeypatch):
    store = open_results_store(output)
    await write_part(store, "0123456789abcdef", 1, [line(0), line(1)])
    watched = WatchedOutput(output, 100)
    await watched.refresh()
    await write_results(output, [line(0), line(1, state="failed"), line(2)])
    await store.remove("parts/0123456789abcdef-000001.jsonl")
    await watched.refresh()
    assert [row["id"] for row in watched.rows] == ["row-0", "row-1", "row-2"]
    assert watched.changes(1)["at"] == [2]  # nothing follows `stored`
    reads = []
    monkeypatch.setattr(OutputFolder, "fetch", lambda *_: reads.append(1))
    await watched.refresh()
    assert reads == []


@pytest.mark.anyio
async def test_rows_beyond_the_limit_are_counted(local):
    await write_results(local, [line(number) for number in range(5)])
    watched = WatchedOutput(local, 3)
    await watched.refresh()
    await watched.refresh()
    assert len(watched.rows) == 3
    assert watched.numbers()["progress"]["leftOut"] == 2


@pytest.mark.anyio
async def test_verdicts_are_recorded_and_the_last_one_wins(output):
    await write_results(output, [line(0), line(1), failed(2)])
    names = [image_thumbnail_name(line(number)["key"]) for number in range(3)]
    async with client_of(output) as page:
        assert (await page.get("")).status_code == 200
        origin = {"Origin": "http://127.0.0.1:8000"}
        for verdict in ("keep", "redo", "reject"):
            body = {"names": names, "verdict": verdict, "since": 1}
            answer = await page.post("verdicts", json=body, headers=origin)
            assert answer.json()["rows"]["columns"]["verdict"] == [verdict, verdict]
        body = {"names": names[:1], "verdict": None}
        await page.post("verdicts", json=body, headers=origin)
    kept = await Verdicts(output).load()
    assert {key: found.verdict for key, found in kept.items()} == {line(1)["key"]: "reject"}


@pytest.mark.anyio
async def test_best_variant_rejects_the_others_of_its_row(local):
    lines = [line(n, id="cat", style="oil", variant_number=n + 1) for n in range(3)]
    other = line(9, id="dog", style="oil")
    await write_results(local, [*lines, other])
    watched = WatchedOutput(local, 100)
    await watched.refresh()
    await watched.judge([image_thumbnail_name(lines[1]["key"])], {"verdict": "best"})
    found = {
        row["key"]: verdict.verdict
        for row in [*lines, other]
        if (verdict := watched.verdicts.get(row["key"]))
    }
    assert list(found.values()) == ["reject", "keep", "reject"]
    await watched.judge([image_thumbnail_name(lines[1]["key"])], {"verdict": "redo"})
    assert watched.verdicts[lines[1]["key"]].variant == 4


@pytest.mark.anyio
async def test_verdicts_of_others_show_on_the_next_load(local):
    await write_results(local, [line(0)])
    watched = WatchedOutput(local, 100)
    await watched.refresh()
    await watched.load_verdicts()
    await Verdicts(local).record([Verdict(key=line(0)["key"], verdict="keep")])
    await watched.load_verdicts()
    assert watched.changes(1)["rows"]["columns"]["verdict"] == ["keep"]


@pytest.mark.parametrize(
    ("host", "token", "headers", "status"),
    [
        ("127.0.0.1:8000", TOKEN, {"Origin": "http://127.0.0.1:8000"}, 200),
        ("localhost:8000", TOKEN, {"Origin": "http://localhost:8000"}, 200),
        ("127.0.0.1:8000", "wrong", {"Origin": "http://127.0.0.1:8000"}, 404),
        ("127.0.0.1:8000", "", {"Origin": "http://127.0.0.1:8000"}, 404),
        ("127.0.0.1:8000", TOKEN, {"Origin": "http://127.0.0.1:9000"}, 403),
        ("127.0.0.1:8000", TOKEN, {"Origin": "https://example.com"}, 403),
        ("127.0.0.1:8000", TOKEN, {"Origin": "null"}, 403),
        ("127.0.0.1:8000", TOKEN, {}, 403),
        ("rebound.example.com", TOKEN, {"Origin": "http://rebound.example.com"}, 403),
        ("127.0.0.1.example.com", TOKEN, {"Origin": "http://127.0.0.1.example.com"}, 403),
    ],
)
@pytest.mark.anyio
async def test_foreign_pages_post_no_verdict(local, host, token, headers, status):
    await write_results(local, [line(0)])
    names = [image_thumbnail_name(line(0)["key"])]
    async with client_of(local, host) as page:
        await page.get(f"http://127.0.0.1:8000/{TOKEN}/")
        url = f"http://{host}/{token}/verdicts"
        answer = await page.post(url, json={"names": names, "verdict": "keep"}, headers=headers)
    assert answer.status_code == status
    assert bool(await Verdicts(local).load()) == (status == 200)
    assert answer.headers["X-Frame-Options"] == "DENY"


@pytest.mark.parametrize("host", ["evil.example.com", "10.0.0.1:8000", ""])
@pytest.mark.anyio
async def test_foreign_hosts_read_nothing(local, host):
    async with client_of(local) as page:
        answer = await page.get("", headers={"Host": host})
        assert answer.status_code == 403
        answer = await page.get("", headers={"Origin": "https://example.com"})
        assert answer.status_code == 403


@pytest.mark.anyio
async def test_only_files_of_the_rows_are_served(local):
    image = picture()
    await write_results(
        local, [line(0, file="a b/ü.jpg"), line(1, file="../secret.jpg"), line(2, file="x.js")]
    )
    await local.write("a b/ü.jpg", image)
    await local.write("other.jpg", image)
    await local.write("x.js", b"alert(1)")
    await local.write("_ledger/format.json", b"{}")
    async with client_of(local) as page:
        await page.get("")
        answer = await page.get("a%20b/%C3%BC.jpg")
        assert (answer.status_code, answer.content) == (200, image)
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        for url in (
            "other.jpg",
            "x.js",
            "_ledger/format.json",
            "results.jsonl",
            "..%2Fsecret.jpg",
            "_gallery/index.json",
            "_gallery/..%2Fother.js",
        ):
            assert (await page.get(url)).status_code in (404, 503), url
        thumbnail = await page.get(f"thumbnails/{image_thumbnail_name(line(0)['key'])}")
        assert thumbnail.headers["Content-Type"] == "image/webp"
        assert (await page.get("thumbnails/0123")).status_code == 404


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b'{"names": ["a"], "verdict": "buy"}',
        b'{"names": 1, "verdict": "keep"}',
        json.dumps({"names": ["NAME"], "verdict": "redo", "prompt": "x" * 10_001}).encode(),
    ],
)
@pytest.mark.anyio
async def test_invalid_verdicts_are_refused(local, body):
    await write_results(local, [line(0)])
    body = body.replace(b"NAME", image_thumbnail_name(line(0)["key"]).encode())
    if b"buy" in body:
        body = body.replace(b'"a"', json.dumps(image_thumbnail_name(line(0)["key"])).encode())
    async with client_of(local) as page:
        await page.get("")
        headers = {"Origin": "http://127.0.0.1:8000"}
        assert (await page.post("verdicts", content=body, headers=headers)).status_code == 400
        large = await page.post("verdicts", content=b"x" * 2_000_000, headers=headers)
        assert large.status_code == 413
    assert await Verdicts(local).load() == {}


@pytest.mark.anyio
async def test_page_without_write_rights_says_so(local, monkeypatch):
    await write_results(local, [line(0)])

    def refuse(*_args, **_options):
        raise PermissionError("read-only")

    monkeypatch.setattr("prefect_flux_kontext.ledger.store.replace_file", refuse)
    async with client_of(local) as page:
        assert (await page.get("")).status_code == 200
        body = {"names": [image_thumbnail_name(line(0)["key"])], "verdict": "keep"}
        headers = {"Origin": "http://127.0.0.1:8000"}
        answer = await page.post("verdicts", json=body, headers=headers)
    assert answer.status_code == 403
    assert "was not recorded" in answer.json()["error"]


def judge(output, **verdicts):
    """Record verdicts by the id of a row; returns the lines by id."""
    results = (output / "results.jsonl").read_text().splitlines()
    lines = {row["id"]: row for row in map(json.loads, results)}
    made = [Verdict(key=lines[name]["key"], **how) for name, how in verdicts.items()]
    asyncio.run(Verdicts(OutputFolder(str(output))).record(made))
    return lines


def test_redo_pays_for_what_verdicts_ask_once(sandbox, tmp_path, capsys):
    manifest, output = tmp_path / "m.csv", tmp_path / "out"
    manifest.write_text("id,prompt,sku\na,A cat,1\nb,A dog,2\nc,A cow,3\nd,A hen,4\n")
    assert main(["run", str(manifest), str(output)]) == 0
    judge(
        output,
        a={"verdict": "redo", "variant": 2},
        b={"verdict": "redo", "prompt": "A wolf"},
        c={"verdict": "redo", "style": "oil"},
        d={"verdict": "keep"},
    )
    capsys.readouterr()
    assert main(["redo", str(output), "--dry-run"]) == 0
    assert "$0.09  price: 3 in pro" in capsys.readouterr().out
    for _ in range(2):
        assert main(["redo", str(output)]) == 0
    assert sandbox.service.bill()["accepted"] == 7
    lines = [json.loads(row) for row in (output / "results.jsonl").read_text().splitlines()]
    found = {(row["id"], row.get("style"), row["variant_number"]): row for row in lines}
    assert set(found) == {
        ("a", None, 1),
        ("a", None, 2),
        ("b", None, 1),
        ("c", None, 1),
        ("c", "oil", 1),
        ("d", None, 1),
    }
    assert found["b", None, 1]["prompt"] == "A wolf"
    assert found["d", None, 1]["verdict"] == "keep"
    assert found["a", None, 2]["sku"] == "1"
    assert (output / "a~v2.jpg").exists()


def test_redo_names_rows_that_cannot_keep_their_input(sandbox, tmp_path, capsys):
    manifest, output = tmp_path / "m.csv", tmp_path / "out"
    (tmp_path / "s.yaml").write_text("ink: {prompt: In ink, extra: {steps: 3}}\n")
    manifest.write_text("id,prompt\na,A cat\n")
    style = ["--style", str(tmp_path / "s.yaml")]
    assert main(["run", str(manifest), str(output), *style]) == 0
    judge(output, a={"verdict": "redo", "prompt": "A dog"})
    assert main(["redo", str(output)]) == 2
    assert "extra input of their style" in capsys.readouterr().err
    judge(output, a={"verdict": "redo", "prompt": "A dog", "style": "ink"})
    assert main(["redo", str(output), *style]) == 0


def test_verdicts_are_joined_into_the_results(sandbox, tmp_path):
    manifest, output = tmp_path / "m.csv", tmp_path / "out"
    manifest.write_text("id,prompt\na,A cat\nb,A dog\n")
    assert main(["run", str(manifest), str(output)]) == 0
    for verdict in ("keep", "reject", None):
        judge(output, a={"verdict": verdict})
        assert main(["gallery", str(output)]) == 0
        rows = [json.loads(row) for row in (output / "results.jsonl").read_text().splitlines()]
        assert [row.get("verdict") for row in rows] == [verdict, None]


def test_damaged_verdict_is_named(tmp_path):
    output = OutputFolder(str(tmp_path))
    asyncio.run(output.write(f"_verdicts/{'0' * 32}.json", b"{}"))
    with pytest.raises(Exception, match=f"_verdicts/{'0' * 32}.json is damaged"):
        asyncio.run(Verdicts(output).load())
