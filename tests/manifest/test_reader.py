"""A CSV file is read correctly, or refused with the line and the fix before any payment."""

import re
import subprocess
import sys

import fsspec
import pytest

from prefect_flux_kontext.errors import ManifestError
from prefect_flux_kontext.manifest.reader import Manifest
from prefect_flux_kontext.manifest.row import RefusedRow, Row
from tests.support.plans import build_plan
from tests.support.s3 import s3_server
from tests.support.served_folder import served_folder

URL = "http://references.test/cat.jpg"
GOOD = f"id,image,prompt\ncat,{URL},oil\ndog,{URL},pencil\n"


@pytest.fixture
def manifest(tmp_path):
    """Return a function that writes text or bytes to a manifest and opens it."""

    def write(content, prompt=None):
        path = tmp_path / "manifest.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return Manifest(str(path), prompt)

    return write


def problem(manifest):
    with pytest.raises(ManifestError) as caught:
        build_plan(manifest)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return caught.value.message


def refused(manifest):
    return {(row.line, row.reason) for row in manifest.rows() if isinstance(row, RefusedRow)}


def test_every_column_goes_into_the_request(manifest):
    (row,) = manifest(
        "prompt,id,image,mode,aspect_ratio,output_format,provider,sku\n"
        f"oil,cat,{URL},max,3:4,png,value,A-1\n"
    ).rows()
    assert (row.id, row.line) == ("cat", 2)
    assert row.request.model_dump(exclude_defaults=True) == {
        "prompt": "oil",
        "image_urls": [URL],
        "mode": "max",
        "aspect_ratio": "3:4",
        "output_format": "png",
        "provider": "value",
    }


@pytest.mark.parametrize(
    "content",
    [
        GOOD,
        GOOD.encode("utf-8-sig"),
        GOOD.replace("\n", "\r\n"),
        GOOD.replace("\n", "\r"),
        GOOD.rstrip("\n"),
        GOOD.replace("\ndog", "\n\n\ndog"),
        GOOD + "\n\n",
        GOOD + ",,\n , ,\n",
        GOOD.replace("\n", ",,\n"),
        GOOD.replace("prompt\n", " prompt \n"),
        GOOD.replace("oil", '"oil"'),
    ],
    ids=[
        "plain",
        "byte order mark",
        "CRLF",
        "CR alone",
        "no last line end",
        "empty lines between",
        "empty lines at the end",
        "rows of empty cells at the end",
        "empty columns at the end",
        "spaces around a name",
        "quoted",
    ],
)
def test_spreadsheet_variants_are_read_alike(manifest, content):
    rows = list(manifest(content).rows())
    assert [(row.id, row.request.prompt) for row in rows] == [("cat", "oil"), ("dog", "pencil")]
    check = build_plan(manifest(content))
    assert (check.rows, check.refused, check.problems) == (2, 0, [])


def test_text_of_every_script_is_unchanged(manifest):
    prompt = "水彩画 на 🦊 عربي é"
    (row,) = manifest(f"id,image,prompt\nλ,{URL},{prompt}\n").rows()
    assert (row.id, row.request.prompt) == ("λ", prompt)


def test_quoted_cell_keeps_commas_and_line_ends(manifest):
    rows = list(
        manifest(
            f'id,image,prompt\na,{URL},"oil, ""thick""\nand bold"\nb,{URL},pencil\nc,{URL},\n'
        ).rows()
    )
    assert rows[0].request.prompt == 'oil, "thick"\nand bold'
    # The line that a row ends on.
    assert [row.line for row in rows] == [3, 4, 5]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "has no column names"),
        (b"\n\n", "has no column names"),
        (b"id,image,prompt\n", "has no rows"),
        (b"id,image,prompt\n,,\n\n", "has no rows"),
        (
            b"id,file\n1,a\n",
            "no column `image` or `prompt`; its columns are: id, file",
        ),
        (b"id,image,image\n1,a,b\n", "has duplicate columns: image"),
        (b"ID,image,prompt\n", "a column 'ID'; rename it to `id`"),
        (b"id,image,prompt,Mode\n", "a column 'Mode'; rename it to `mode`"),
        (b"id,image,prompt,Aspect-Ratio\n", "rename it to `aspect_ratio`"),
        (b"id,image,prompt,output format\n", "rename it to `output_format`"),
        (
            f'id,image,prompt\n1,{URL},"oil\n2,{URL},x\n'.encode(),
            r"Line 3 .*unexpected end.*starts on line 2",
        ),
        (f'id,image,prompt\n1,{URL},"oil"x\n'.encode(), "[Ll]ine 2 .*is not valid CSV"),
        (GOOD.encode("utf-16"), "[Ll]ine 1 .*not UTF-8; save the manifest as UTF-8"),
        (GOOD.encode("utf-16-be"), "NUL characters, as in UTF-16"),
        (GOOD.replace(",", "|").encode(), "delimiter seems to be pipes; use commas"),
        (f"1,{URL},oil\n".encode(), "header seems to be missing; add a first line"),
        (b"<!DOCTYPE html>\n<html>404</html>\n", "looks like an HTML or XML page"),
        (f"id,image,prompt\n1,{URL},été\n".encode("latin-1"), "[Ll]ine 2 .*not UTF-8"),
        (GOOD.encode() + f"x,{URL},été\n".encode("latin-1"), "[Ll]ine 4 .*not UTF-8"),
        (b"\x1f\x8b\x08\x00" + bytes(range(256)), "not UTF-8|is not valid CSV"),
        (b'id,image,prompt\n1,http://a/b,"' + b"x" * 200_000 + b'"\n', "larger than field limit"),
    ],
)
def test_invalid_file_is_refused_with_line_and_fix(manifest, content, expected):
    made = manifest(content)
    message = problem(made)
    assert made.url in message
    assert re.search(expected, message)


def test_line_of_bad_text_is_right_in_a_long_file(manifest):
    lines = [f"{number},{URL},oil" for number in range(50_000)]
    lines[40_000] += " é"
    content = "\n".join(["id,image,prompt", *lines]).encode("latin-1")
    assert "Line 40002 of" in problem(manifest(content))


@pytest.mark.parametrize(
    "url",
    ["{tmp}/none.csv", "{tmp}", "nope://x.csv", "memory://none.csv", "file://{tmp}/none", "a\0b"],
)
def test_unreadable_manifest_is_a_manifest_error(url, tmp_path):
    url = url.format(tmp=tmp_path)
    assert url.replace("\0", r"\x00") in problem(Manifest(url))


def test_plan_lists_all_thirty_refused_rows(manifest):
    lines = [f"{number},not a url,oil" for number in range(30)]
    check = build_plan(manifest("\n".join(["id,image,prompt", *lines, f"x,{URL},oil"])))
    assert (check.rows, check.refused, len(check.problems)) == (31, 30, 30)
    assert check.problems[0].line == 2


def test_row_with_too_many_cells_is_refused_alone(manifest):
    made = manifest(f"id,image,prompt\na,{URL},oil, thick\nb,{URL},pencil\n")
    assert refused(made) == {
        (2, "the row has 1 more cell than columns; quote cells that contain commas")
    }
    assert build_plan(made).rows == 2


def test_row_with_too_few_cells_is_refused(manifest):
    """A missing cell may have shifted the others into the wrong columns."""
    made = manifest(f"id,image,prompt,mode\na,{URL},oil\nb,{URL},pencil,\n")
    assert refused(made) == {(2, "the row has 3 of 4 cells; add the missing ones")}


@pytest.mark.parametrize(
    ("first", "second"),
    [("cat", "cat"), ("cat", "CAT"), (" cat", "cat "), ("Straße", "Straße"), ("é", "e\u0301")],
)
def test_duplicate_id_is_refused_with_the_first_line(manifest, first, second):
    rows = list(manifest(f"id,image,prompt\n{first},{URL},a\n{second},{URL},b\n").rows())
    assert isinstance(rows[0], Row)
    assert isinstance(rows[1], RefusedRow)
    assert rows[1].reason == (
        f"duplicate id {second.strip()!r}, first used on line 2; ids name files"
    )


def test_equal_rows_without_id_are_not_paid_twice(manifest):
    made = manifest(f"image,prompt\n{URL},oil\n{URL},oil\n{URL},pencil\n")
    assert [type(row) for row in made.rows()] == [Row, RefusedRow, Row]


def test_made_ids_are_stable_and_name_the_image(manifest):
    content = f"image,prompt\n{URL},oil\nhttp://a.test/x%20y.png?sig=1,oil\n"
    first, second = (row.id for row in manifest(content).rows())
    assert first.startswith("cat-")
    assert second.startswith("x y-")
    swapped = "\n".join(content.splitlines()[i] for i in (0, 2, 1))
    assert {row.id for row in manifest(swapped).rows()} == {first, second}


def test_rows_can_be_read_again(manifest):
    made = manifest(GOOD)
    assert list(made.rows()) == list(made.rows())


def test_manifest_is_read_from_memory():
    fsspec.filesystem("memory").pipe_file("/manifests/a.csv", GOOD.encode())
    assert build_plan(Manifest("memory://manifests/a.csv")).rows == 2


def test_manifest_is_read_from_s3():
    """Errors of S3 become manifest errors."""
    with s3_server() as (bucket, client):
        client.put_object(Bucket="pictures", Key="in/a.csv", Body=GOOD.encode())
        assert build_plan(Manifest(f"{bucket}/in/a.csv")).rows == 2
        assert "There is no manifest at" in problem(Manifest(f"{bucket}/in/none.csv"))
        assert "s3://no-bucket/a.csv" in problem(Manifest("s3://no-bucket/a.csv"))


def test_missing_s3_credentials_are_a_manifest_error(monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    # Otherwise botocore asks a cloud's metadata service.
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    # Nothing listens there, in case a request is made.
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    # Another test may have left a store configured.
    monkeypatch.delitem(fsspec.config.conf, "s3", raising=False)
    fsspec.filesystem("s3").clear_instance_cache()
    try:
        assert "credentials" in problem(Manifest("s3://bucket/a.csv"))
    finally:
        fsspec.filesystem("s3").clear_instance_cache()


def test_existing_file_with_glob_characters_is_read(tmp_path):
    path = tmp_path / "a[1]*?.csv"
    path.write_text(GOOD)
    assert build_plan(Manifest(str(path))).rows == 2


CHECK = """
import resource, sys
from prefect_flux_kontext.manifest.reader import Manifest
from tests.support.plans import build_plan

def peak_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

build_plan(Manifest(sys.argv[1]))
before = peak_memory()
check = build_plan(Manifest(sys.argv[2]))
print(check.rows, check.refused, peak_memory() - before)
"""


def test_many_rows_are_checked_in_little_memory(tmp_path):
    paths = [tmp_path / "short.csv", tmp_path / "long.csv"]
    for path, rows in zip(paths, (100, 100_000), strict=True):
        with path.open("w") as file:
            file.write("id,image,prompt\n")
            for number in range(rows):
                file.write(f"row-{number},{URL}?{number},a watercolour {'x' * 200}\n")
    # In a separate process, so that nothing else changes its peak.
    ran = subprocess.run(
        [sys.executable, "-c", CHECK, *paths], capture_output=True, text=True, check=True
    )
    rows, refused, memory = map(int, ran.stdout.split())
    assert (rows, refused) == (100_000, 0)
    # All rows take over 100 MB. The plan keeps a short hash and a line number of each.
    assert memory < 40e6


@pytest.mark.parametrize("name", ["m.csv", "m.parquet", "m.jsonl.gz"])
def test_manifest_url_is_guarded_like_a_download(name, tmp_path, monkeypatch):
    """Others may choose the URL; this machine's own services are not for them."""
    (tmp_path / "m.csv").write_text("image,prompt\n")
    with served_folder(tmp_path) as url:
        for place in (
            url,
            "http://169.254.169.254/latest",
            "http://2852039166",
            "http://10.0.0.7",
        ):
            message = problem(Manifest(f"{place}/{name}"))
            assert "which is not a public address; nothing was sent" in message
        monkeypatch.setenv("FLUX_KONTEXT_BASE_URL", url)  # the service is on this machine too
        assert "169.254.169.254 (cloud metadata service)" in problem(
            Manifest("http://169.254.169.254/latest/m.csv")
        )
        assert problem(Manifest(f"{url}/none.csv")).startswith("There is no manifest at")


def test_page_on_the_web_is_not_echoed(tmp_path, monkeypatch):
    secret = "root:x:0:0:canary"
    (tmp_path / "m.csv").write_text(f"{secret},file name\n")
    with served_folder(tmp_path) as url:
        monkeypatch.setenv("FLUX_KONTEXT_BASE_URL", url)
        message = problem(Manifest(f"{url}/m.csv"))
    assert "its columns are: …, file name." in message
    assert secret in problem(Manifest(str(tmp_path / "m.csv")))
