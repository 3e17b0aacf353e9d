"""Files and references as people have them: nothing wrong is paid for, nothing is left out."""

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefect_flux_kontext.errors import ManifestError
from prefect_flux_kontext.manifest.reader import Manifest
from prefect_flux_kontext.manifest.row import RefusedRow, find_reference_problems, make_row
from prefect_flux_kontext.references.location import is_share_page
from tests.support.plans import build_plan

C = "https://cdn.example.com"
PUBLIC = "https://api.apixo.ai"
TABLE = f"id,image,prompt\na,{C}/a.jpg,oil\nb,{C}/b.jpg,ink\n"


def read(path, content, **options):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(Manifest(str(path), **options).rows())


@pytest.mark.parametrize("between", [", ", ",", " ", ";", " | ", ",  "])
def test_several_urls_are_split_only_in_images(between):
    text = between.join(f"{C}/{n}.jpg" for n in (1, 2))
    assert "2 reference images" in make_row(2, {"images": text, "prompt": "x"}).reason
    assert "several URLs" in make_row(2, {"image": text, "prompt": "x"}).reason


@pytest.mark.parametrize("url", [f"{C}/w_200,h_300/a.jpg", f"{C}/a.jpg?crop=1,2;3"])
def test_commas_of_a_url_are_kept(url):
    assert make_row(2, {"images": url, "prompt": "x"}).request.image_urls == [url]
    two = make_row(2, {"images": f"{url}, {C}/b.jpg", "prompt": "x"})
    assert "2 reference images" in two.reason
    assert find_reference_problems(url, PUBLIC) == []


@pytest.mark.parametrize(
    "host",
    [
        *("localhost:8000", "192.168.1.5", "10.0.0.1", "172.16.0.1", "127.1", "2130706433"),
        *("0x7f000001", "[::1]", "[fd00::1]", "[::ffff:10.0.0.1]", "nas", "nas.local", "x.lan"),
        *("host.docker.internal", "0.0.0.0", "100.64.0.1", "LOCALHOST."),
    ],
)
def test_host_out_of_reach_is_refused(host):
    url = f"http://{host}/a.jpg"
    assert "cannot reach" in find_reference_problems(url, PUBLIC)[0]
    assert find_reference_problems(url, "http://127.0.0.1:8000") == []


@pytest.mark.parametrize("url", [f"{C}/a b.jpg", f"{C}/a\u00a0b.jpg"])
def test_white_space_in_a_url_is_refused(url):
    assert "white space" in find_reference_problems(url)[0]


def test_share_pages_are_counted():
    pages = ["https://drive.google.com/file/d/1/view", "https://www.dropbox.com/s/1/a.jpg?dl=0"]
    images = ["https://www.dropbox.com/s/1/a.jpg?raw=1", f"{C}/drive.google.com/file/a.jpg"]
    assert [is_share_page(url) for url in pages + images] == [True, True, False, False]
    plan = build_plan(Manifest([{"image": url, "prompt": "x"} for url in pages + images]))
    assert "2  references to share pages" in str(plan)


@pytest.mark.parametrize("header", ["ID,SKU,Images", "id,SKU,Images", "Id,SKU,Images"])
def test_mapping_wins_over_other_columns(tmp_path, header):
    columns = {"id": "SKU", "images": "Images"}
    (row,) = read(tmp_path / "m.csv", f"{header}\n1,s,{C}/a.jpg\n", columns=columns, prompt="x")
    assert (row.id, row.request.image_urls) == ("s", [f"{C}/a.jpg"])


@pytest.mark.parametrize("name", ["picture", "photo_url", "file", "Variant Image"])
def test_unused_column_of_images_is_named(tmp_path, name):
    content = f"id,{name},prompt\n1,{C}/a.jpg,oil\n"
    with pytest.raises(ManifestError, match=f"--columns image={name}"):
        read(tmp_path / "m.csv", content)
    (row,) = read(tmp_path / "m.csv", content, text_to_image=True)
    assert row.request.image_urls == []


def test_unused_columns_refuse_nothing(tmp_path):
    path = tmp_path / "m.parquet"
    table = {
        "prompt": ["oil", "ink"],
        "score": [float("nan"), 1.0],
        "raw": [b"\xff\0", b""],
        "page": ["x" * 600_000, "y"],
        "vector": [[float("nan")] * 700, [1.0]],
    }
    pq.write_table(pa.table(table), path)
    rows = list(Manifest(str(path)).rows())
    assert [row.request.prompt for row in rows] == ["oil", "ink"]
    assert rows[1].cells["page"] == "y"


def test_image_struct_is_named(tmp_path):
    path = tmp_path / "m.parquet"
    image = [{"bytes": b"\xff\xd8", "path": "a.jpg"}]
    pq.write_table(pa.table({"image": image, "prompt": ["oil"]}), path)
    (row,) = Manifest(str(path)).rows()
    assert isinstance(row, RefusedRow)
    assert "a struct of bytes, path" in row.reason


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("m.csv", "sep=,\n" + TABLE, None),
        ("m.csv", "sep=;\r\n" + TABLE.replace(",", ";"), None),
        ("m.csv", TABLE.replace(",", ";"), "semicolon"),
        ("m.csv", TABLE.replace(",", "\t"), "tsv"),
        ("m", TABLE.replace(",", "\t"), None),
        ("m.json", json.dumps([{"id": i, "prompt": "x"} for i in "ab"]), None),
        ("m.txt", json.dumps([{"id": i, "prompt": "x"} for i in "ab"]), None),
    ],
)
def test_dialects_are_read(tmp_path, name, content, kind):
    assert [row.id for row in read(tmp_path / name, content, format=kind)] == ["a", "b"]


def test_workbook_is_named(tmp_path):
    with pytest.raises(ManifestError, match="a workbook or an archive; save the sheet as CSV"):
        read(tmp_path / "m.csv", b"PK\x03\x04" + bytes(100))


@pytest.mark.parametrize("prompt", ['"oil" paint', '"open', '5" nail', 'a "b" c', '"'])
def test_marks_in_tsv_join_no_rows(tmp_path, prompt):
    content = f"id\tprompt\n1\t{prompt}\n2\t{prompt}\n3\tink\n"
    rows = read(tmp_path / "m.tsv", content)
    assert [row.request.prompt for row in rows] == [prompt, prompt, "ink"]


@pytest.mark.parametrize("mode", ["no length", "packed", "no HEAD", "redirect"])
def test_web_manifest_is_read_as_a_stream(mode, monkeypatch):
    # Manifests on this machine are read only for a service that is on it too.
    monkeypatch.setenv("FLUX_KONTEXT_BASE_URL", "http://127.0.0.1:8765")

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(405 if mode == "no HEAD" else 200)
            self.end_headers()

        def do_GET(self):
            body = TABLE.replace(",", "\t").encode()
            if mode == "redirect" and self.path != "/there":
                self.send_response(302)
                self.send_header("Location", "/there")
                self.end_headers()
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/tab-separated-values; charset=utf-8")
            if mode == "packed":
                self.send_header("Content-Encoding", "gzip")
                body = gzip.compress(body)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/export?format=tsv"
        assert [row.id for row in Manifest(url).rows()] == ["a", "b"]
    finally:
        server.shutdown()
        server.server_close()


def test_plan_counts_what_it_read(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text(TABLE + "\n\nc,,a poster\n", encoding="utf-8")
    plan = build_plan(Manifest(str(path)))
    assert (plan.lines, plan.rows, plan.with_reference) == (6, 3, 2)
    assert "2  with a reference" in str(plan)
    assert "1  without a reference" in str(plan)


def test_long_and_odd_names_get_ids(tmp_path):
    folder = tmp_path / ("d" * 150)
    folder.mkdir()
    for name in ("x" * 100 + ".jpg", "mark\u200e.jpg", ".DS_Store"):
        (folder / name).write_bytes(b"")
    rows = list(Manifest(str(tmp_path), prompt="oil").rows())
    assert len({row.id for row in rows}) == 2
    assert not [row for row in rows if isinstance(row, RefusedRow)]


@pytest.mark.parametrize("key", ["#root.jpg", "?q.jpg", "a#b.jpg", "/slash.jpg"])
def test_key_of_a_bucket_is_no_url(key):
    assert find_reference_problems(f"s3://bucket/{key}") == []


@pytest.mark.parametrize("end", [",", ";", "|", '"', "'", ", ", " ;"])
def test_url_with_a_trailing_separator_is_refused(end):
    url = f"{C}/a.jpg{end}"
    assert "remove it" in make_row(2, {"image": url, "prompt": "x"}).reason
    if end.strip() in ",;|":
        row = make_row(2, {"images": url, "prompt": "x"})
        assert row.request.image_urls == [f"{C}/a.jpg"]


@pytest.mark.parametrize("entity", ["&amp;", "&AMP;", "&#38;", "&#x26;"])
def test_url_written_as_in_html_is_refused(entity):
    problem = find_reference_problems(f"{C}/a.jpg?crop=1,2{entity}width=80")[0]
    assert "replace &amp; by &" in problem
    assert find_reference_problems(f"{C}/a&amp;b.jpg?crop=1&amplitude=2") == []


@pytest.mark.parametrize(
    "text",
    [
        f"photo one.jpg ({C}/v3/a?ts=1)",
        f"a.jpg ({C}/1),b.jpg ({C}/2)",
        f'=IMAGE("{C}/a.jpg")',
        f'=HYPERLINK("{C}/a.jpg","a")',
        f"![a]({C}/a.jpg)",
        f'<img src="{C}/a.jpg">',
        f"\u201c{C}/a.jpg\u201d",
    ],
)
def test_text_beside_a_url_is_named(text):
    text = text.replace("/a", "/a?X-Amz-Signature=feed")
    row = make_row(2, {"image": text, "prompt": "x"})
    assert "other text beside a URL; keep only the URL" in row.reason
    assert "feed" not in row.reason


def test_references_of_other_formats_are_counted():
    """They may still be images of another format, so they are not refused."""
    others = [f"{C}/a.{kind}" for kind in ("svg", "GIF", "heic?x=1", "tiff#a", "mp4")]
    images = [f"{C}/a.jpg", f"{C}/a", f"{C}/a.gif/b.webp", f"{C}/a?file=b.gif"]
    plan = build_plan(Manifest([{"image": url, "prompt": "x"} for url in others + images]))
    assert plan.other_formats == 5
    assert "5  references named as no JPG, PNG or WebP file" in str(plan)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_row_cut_by_a_carriage_return_is_refused(tmp_path, end):
    """With `--skip-invalid`, its beginning would be paid for as if it were all."""
    lines = ["id,image,prompt", f"1,{C}/a.jpg,a big\rred cat", f'2,{C}/b.jpg,"a\rcat"', ""]
    first, second, third = read(tmp_path / "m.csv", end.join(lines))
    assert "carriage return" in first.reason
    assert isinstance(second, RefusedRow)
    assert third.request.prompt == "a\rcat"


@pytest.mark.parametrize("encoding", ["DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY", "PLAIN"])
def test_parquet_of_other_writers_is_read(encoding, tmp_path):
    """Spark and others write texts without dictionaries, each as what differs from the last."""
    prompts = [f"oil painting number {number}" for number in range(3_000)]
    pq.write_table(
        pa.table({"prompt": prompts, "tags": [["a", prompt] for prompt in prompts]}),
        tmp_path / "m.parquet",
        use_dictionary=False,
        column_encoding={"prompt": encoding, "tags.list.element": encoding},
        data_page_version="2.0",
        row_group_size=1_000,
    )
    rows = list(Manifest(str(tmp_path / "m.parquet")).rows())
    assert [row.request.prompt for row in rows] == prompts
    assert rows[-1].cells["tags"] == '["a", "oil painting number 2999"]'
