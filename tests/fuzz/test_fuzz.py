"""Whatever others can write gives a result or one of our errors, never anything else.

The suite tries a hundred inputs a target, the same each time. `make fuzz` tries others for longer;
what fails is kept in `.hypothesis` and tried first. Put it into a corpus here once it is fixed.
"""

import asyncio
import bz2
import contextlib
import gzip
import io
import json
import lzma
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_flux_kontext.callbacks.inbox import Callback, Inbox
from prefect_flux_kontext.callbacks.tokens import Attempt, create_token, parse_token
from prefect_flux_kontext.client.addresses import classify_host
from prefect_flux_kontext.client.responses import (
    read_balance,
    read_callback,
    read_envelope,
    read_status,
    read_task_id,
)
from prefect_flux_kontext.errors import (
    ApiError,
    InvalidImageError,
    LedgerError,
    ManifestError,
    ReferenceImageError,
)
from prefect_flux_kontext.images.decode import inspect_image
from prefect_flux_kontext.images.headers import (
    find_slow_structure,
    read_displayed_size,
    read_size,
)
from prefect_flux_kontext.images.metadata import add_ai_metadata, remove_metadata
from prefect_flux_kontext.ledger.head import Head, check_format
from prefect_flux_kontext.ledger.heartbeat import Heartbeat, find_budget_run, is_alive
from prefect_flux_kontext.ledger.ledger import Ledger
from prefect_flux_kontext.ledger.records import Ended, Intent, Posted
from prefect_flux_kontext.ledger.store import RecordStore
from prefect_flux_kontext.ledger.waves import (
    FinishedRow,
    OpenWave,
    read_finished_rows,
    read_open_waves,
)
from prefect_flux_kontext.manifest.reader import Manifest
from prefect_flux_kontext.manifest.row import RefusedRow, Row, find_reference_problems
from prefect_flux_kontext.models import GenerationRequest
from prefect_flux_kontext.redaction import make_showable, redact_text
from prefect_flux_kontext.references.location import find_location_problem
from prefect_flux_kontext.references.ratio import find_nearest_ratio
from prefect_flux_kontext.references.rights import Rights, find_rights_problem
from prefect_flux_kontext.references.staging import is_loopback_url
from prefect_flux_kontext.references.validation import check_image
from tests.fuzz.mutations import mutated
from tests.images.test_metadata import jpeg, png, webp
from tests.manifest import lying_parquet
from tests.support.pictures import animation, picture
from tests.test_redaction import SECRET, URLS

TABLE = (
    b"id,image,prompt,style,mode,output\n"
    b'a,https://a.test/cat.jpg?sig=1,"oil, on\ncanvas",oil,pro,a/b.jpg\n'
    b"b,s3://bucket/cat.jpg,{{ id }},,max,\n"
)
LINES = (
    b'{"id": 1, "images": ["https://a.test/\\u00e9.jpg", "b.jpg"], "prompt": "oil"}\n'
    b'{"prompt": {"a": [1, 2.5, null, true]}, "x": "\\ud83d\\ude00"}\n'
)


def parquet(**options):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    columns = {
        "id": ["a", None, "c"],
        "prompt": ["oil", "ink", "x" * 300],
        "images": [["https://a.test/1.jpg"], [], None],
        "s": [{"a": 1, "b": "x"}, None, {"a": None, "b": None}],
        "n": [1.5, None, 3.0],
    }
    pq.write_table(pa.table(columns), file, **options)
    return file.getvalue()


def zstd(data):
    return pytest.importorskip("zstandard").compress(data)


LYING = [
    lying_parquet.parquet_file(pages, rows)
    for pages, rows in (
        (lying_parquet.long_dictionary(20, 100), 100),
        (lying_parquet.long_texts(20, 3), 3),
        (lying_parquet.distinct_texts(20, 200), 200),
    )
]
MANIFESTS = {
    "m.csv": [TABLE, TABLE.replace(b"\n", b"\r\n"), b"\xef\xbb\xbf" + TABLE],
    "m.tsv": [TABLE.replace(b",", b"\t")],
    "m.jsonl": [LINES, LINES * 3],
    "m.json": [b"[%b]" % LINES.strip().replace(b"\n", b","), b'[{"prompt": "oil"}]\n', b"[]"],
    "m.parquet": [parquet(), parquet(use_dictionary=False, data_page_version="2.0"), *LYING],
    "m.csv.gz": [gzip.compress(TABLE, mtime=0)],
    "m.jsonl.bz2": [bz2.compress(LINES)],
    "m.csv.xz": [lzma.compress(TABLE)],
    "m.csv.zst": [zstd(TABLE)],
}
SIZE = (24, 16)
IMAGES = [
    jpeg(size=SIZE),
    jpeg(size=SIZE, progressive=True),
    jpeg(mode="CMYK", size=SIZE),
    png(),
    webp(size=SIZE),
    webp(mode="RGBA", size=SIZE, lossless=True),
    picture("png", "P", SIZE),
    animation("webp", SIZE),
    animation("png", SIZE),
]
REPLIES = [
    json.dumps(reply).encode()
    for reply in (
        {"code": 200, "message": "success", "data": {"taskId": "task_1"}},
        {"code": 402, "msg": "no balance", "data": {"error": {"code": 1}}},
        {"code": 200, "data": {"taskId": "task_1", "state": "processing"}},
        {
            "code": 200,
            "data": {
                "taskId": "task_1",
                "state": "success",
                "resultJson": '{"resultUrls": ["http://a.test/1.jpg"]}',
                "createTime": 1_700_000_000_000,
                "completeTime": 1_700_000_030_000,
                "costTime": 30_000,
            },
        },
        {"data": {"taskId": "task_1", "state": "failed", "failCode": "X", "failMsg": "y"}},
        {"code": 200, "data": {"balance": "12.5"}},
    )
]
KEY = "0123456789abcdef0123456789abcdef"
REQUEST = GenerationRequest(prompt="oil", image_urls=["https://a.test/cat.jpg"])
ENDED = Ended(state="stored", task_id="task_1", files=["a.jpg"])
RECORDS = {
    "intent": Intent(
        key=KEY, attempt=1, owner="o", nonce="n", row_id="a", line=2, request=REQUEST, price=0.03
    ),
    "posted": Posted(state="accepted", by="o", task_id="task_1"),
    "ended": ENDED,
}
HEARTBEATS = []
with tempfile.TemporaryDirectory() as _folder:
    asyncio.run(Heartbeat("o", 15.0, has_budget=True).beat(RecordStore(_folder)))
    HEARTBEATS += [path.read_bytes() for path in Path(_folder, "owners").iterdir()]
HEARTBEATS += [
    b'{"machine": "m", "pid": 1, "started": "1", "beat": 1.0}',
    HEARTBEATS[0].replace(b'"pid": ', b'"pid": 99999999999999999999'),
    HEARTBEATS[0].replace(b'"beat": ', b'"beat": %b' % (b"9" * 400)),
    b"[" * 100_000,
]
CALLBACK = Callback(owner="o", key=KEY, number=1, task_id="task_1").model_dump_json().encode()
LOCATIONS = [
    "/data/a.jpg",
    "file:///etc/passwd",
    "simplecache::s3://bucket/a.jpg",
    "~/a.jpg",
    "$HOME/a.jpg",
    "s3://bucket/../other/a.jpg",
    "//host/a.jpg",
    "C:\\a.jpg",
    "http://[::ffff:7f00:1]/a.jpg",
    "http://127\u30020\u30020\u30021/a.jpg",
]
WAVES = {
    "waves/o-000001.jsonl": FinishedRow(
        key=KEY, row_id="a", attempt=1, spent=0.03, failures=0, ended=ENDED
    ),
    "waves/o-000001.open.json": OpenWave(name="o-000001", owner="o", keys=[KEY]),
}


@pytest.mark.parametrize("name", MANIFESTS)
@given(data=st.data())
def test_manifest_is_read_or_refused(name, data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(data.draw(mutated(MANIFESTS[name])))
        with contextlib.suppress(ManifestError):
            assert all(isinstance(row, Row | RefusedRow) for row in Manifest(str(path)).rows())


@given(mutated(IMAGES))
def test_image_is_checked_or_refused(data):
    find_slow_structure(data)
    read_size(data)
    size = read_displayed_size(data)
    assert size is None or (size[0] and size[1] and find_nearest_ratio(*size)) or not all(size)
    add_ai_metadata(data, "trainedAlgorithmicMedia")
    with contextlib.suppress(InvalidImageError):
        inspect_image(data)
    with contextlib.suppress(ReferenceImageError):
        check_image(data, fit=True)
        check_image(remove_metadata(data), fit=True)


@given(mutated(REPLIES), st.sampled_from([200, 202, 400, 401, 429, 500, 302]))
def test_reply_is_read_or_is_an_api_error(body, status):
    for read in (
        read_task_id,
        read_balance,
        lambda envelope: read_status(envelope, task_id="task_1"),
    ):
        with contextlib.suppress(ApiError):
            read(read_envelope(status, body))


@given(mutated(REPLIES))
def test_callback_names_a_task_or_none(body):
    assert isinstance(read_callback(body), str | None)


@given(mutated([create_token(b"s" * 32, Attempt("0123456789abcdef", KEY, 1)).encode()]))
def test_token_is_genuine_or_refused(token):
    text = token.decode("latin-1")
    attempt = parse_token(b"s" * 32, text)
    assert attempt is None or create_token(b"s" * 32, attempt) == text


@pytest.mark.parametrize("kind", RECORDS)
@given(data=st.data())
def test_ledger_record_is_read_or_is_a_ledger_error(kind, data):
    records = {name: record.model_dump_json().encode() for name, record in RECORDS.items()}
    records[kind] = data.draw(mutated(list(records.values())))
    with tempfile.TemporaryDirectory() as folder:
        for name, content in records.items():
            path = Path(folder, f"rows/{KEY[:2]}/{KEY}.1.{name}.json")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        with contextlib.suppress(LedgerError):
            entry = asyncio.run(Ledger(RecordStore(folder), "o", {}).read(KEY))
            assert entry.attempt == 1


@given(mutated([Head(service="https://a.test", account="a").model_dump_json().encode()]))
def test_head_record_is_read_or_is_a_ledger_error(record):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "format.json").write_bytes(record)
        with contextlib.suppress(LedgerError):
            str(asyncio.run(check_format(RecordStore(folder))))


@given(mutated(HEARTBEATS))
def test_heartbeat_is_read_or_is_a_ledger_error(record):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "owners").mkdir()
        Path(folder, "owners", "o.json").write_bytes(record)
        for read in (is_alive(RecordStore(folder), "o"), find_budget_run(RecordStore(folder))):
            with contextlib.suppress(LedgerError):
                asyncio.run(read)


@given(mutated([CALLBACK, CALLBACK + b"\n" + CALLBACK]))
def test_callback_file_is_read_or_is_a_ledger_error(lines):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "o").mkdir()
        Path(folder, "o", "1.jsonl").write_bytes(lines)
        with contextlib.suppress(LedgerError):
            callbacks = asyncio.run(Inbox(RecordStore(folder)).read("o", "1.jsonl"))
            assert all(isinstance(each.attempt, Attempt) for each in callbacks)


@given(mutated([url.encode() for url in [*URLS, *LOCATIONS]]))
def test_reference_is_judged_by_any_text(data):
    text = data.decode("utf-8", "surrogateescape")
    find_reference_problems(text, "https://api.example.com")
    find_location_problem(text)
    find_rights_problem(text, Rights("/data", ("/data", "s3://bucket")))
    is_loopback_url(text)
    classify_host(text)


@pytest.mark.parametrize("name", WAVES)
@given(data=st.data())
def test_wave_file_is_read_or_is_a_ledger_error(name, data):
    async def read(store):
        return [row async for row in read_finished_rows(store)], [
            wave async for wave in read_open_waves(store)
        ]

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.parent.mkdir()
        line = WAVES[name].model_dump_json().encode() + b"\n"
        path.write_bytes(data.draw(mutated([line, line * 3])))
        with contextlib.suppress(LedgerError):
            asyncio.run(read(RecordStore(folder)))


@given(mutated([url.encode() for url in URLS] + [json.dumps(URLS).encode()]))
def test_redaction_never_fails_and_ends(data):
    text = data.decode("utf-8", "replace")
    once = redact_text(text)
    assert redact_text(once) == once
    make_showable(text)


@given(st.text(max_size=50), st.sampled_from(URLS), st.text(max_size=50))
def test_secret_is_removed_between_any_text(before, url, after):
    for text in (f"{before} {url} {after}", json.dumps([before, url, after])):
        assert SECRET not in make_showable(text)
