"""Any CSV file is read right or refused with the line and what to do, before anything is paid."""

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

URL = "http://references.test/cat.jpg"
GOOD = f"id,image,prompt\ncat,{URL},oil\ndog,{URL},pencil\n"


@pytest.fixture
def manifest(tmp_path):
    """Make a manifest of text or bytes."""

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
def test_what_spreadsheets_write_is_read_the_same(manifest, content):
    rows = list(manifest(content).rows())
    assert [(row.id, row.request.prompt) for row in rows] == [("cat", "oil"), ("dog", "pencil")]
    check = build_plan(manifest(content))
    assert (check.rows, check.refused, check.problems) == (2, 0, [])


def test_text_of_every_script_arrives_as_it_is(manifest):
    prompt = "水彩画 на 🦊 عربي é"
    (row,) = manifest(f"id,image,prompt\nλ,{URL},{prompt}\n").rows()
    assert (row.id, row.request.prompt) == ("λ", prompt)


def test_quotes_commas_and_line_ends_inside_a_cell_belong_to_it(manifest):
    rows = list(
        manifest(
            f'id,image,prompt\na,{URL},"oil, ""thick""\nand bold"\nb,{URL},pencil\nc,{URL},\n'
        ).rows()
    )
    assert rows[0].request.prompt == 'oil, "thick"\nand bold'
    # The line that a row ends on.
    assert [row.line for row in rows] == [3, 4, 5]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "names nothing"),
        (b"\n\n", "names nothing"),
        (b"id,image,prompt\n", "has no rows"),
        (b"id,image,prompt\n,,\n\n", "has no rows"),
        (
            b"id,file\n1,a\n",
            "neither a column `image` nor `prompt`; its first line names id, file",
        ),
        (b"id,image,image\n1,a,b\n", r"a column twice: \['image'\]"),
        (b"ID,image,prompt\n", "a column 'ID'; spell it `id`"),
        (b"id,image,prompt,Mode\n", "a column 'Mode'; spell it `mode`"),
        (b"id,image,prompt,Aspect-Ratio\n", "spell it `aspect_ratio`"),
        (b"id,image,prompt,output format\n", "spell it `output_format`"),
        (
            f'id,image,prompt\n1,{URL},"oil\n2,{URL},x\n'.encode(),
            r"Line 3 .*unexpected end.*begins on line 2",
        ),
        (f'id,image,prompt\n1,{URL},"oil"x\n'.encode(), "[Ll]ine 2 .*is not CSV"),
        (GOOD.encode("utf-16"), "[Ll]ine 1 .*not in UTF-8; save the manifest as UTF-8"),
        (GOOD.encode("utf-16-be"), "NUL characters, as UTF-16 does"),
        (GOOD.replace(",", ";").encode(), "separated by semicolons; separate them by commas"),
        (f"1,{URL},oil\n".encode(), "no line of column names; put one first"),
        (b"<!DOCTYPE html>\n<html>404</html>\n", "looks like a page of HTML"),
        (f"id,image,prompt\n1,{URL},été\n".encode("latin-1"), "[Ll]ine 2 .*not in UTF-8"),
        (GOOD.encode() + f"x,{URL},été\n".encode("latin-1"), "[Ll]ine 4 .*not in UTF-8"),
        (b"\x1f\x8b\x08\x00" + bytes(range(256)), "not in UTF-8|is not CSV"),
        (b'id,image,prompt\n1,http://a/b,"' + b"x" * 200_000 + b'"\n', "larger than field limit"),
    ],
)
def test_a_file_that_is_no_manifest_is_refused_with_its_line_and_what_to_do(
    manifest, content, told
):
    made = manifest(content)
    message = problem(made)
    assert made.url in message
    assert re.search(told, message)


def test_the_line_of_bad_text_is_right_deep_in_a_long_file(manifest):
    lines = [f"{number},{URL},oil" for number in range(50_000)]
    lines[40_000] += " é"
    content = "\n".join(["id,image,prompt", *lines]).encode("latin-1")
    assert "Line 40002 of" in problem(manifest(content))


@pytest.mark.parametrize(
    "url",
    ["{tmp}/none.csv", "{tmp}", "nope://x.csv", "memory://none.csv", "file://{tmp}/none", "a\0b"],
)
def test_a_manifest_that_cannot_be_opened_is_a_manifest_error(url, tmp_path):
    url = url.format(tmp=tmp_path)
    assert url in problem(Manifest(url))


def test_the_plan_keeps_every_refused_row_of_thirty(manifest):
    lines = [f"{number},not a url,oil" for number in range(30)]
    check = build_plan(manifest("\n".join(["id,image,prompt", *lines, f"x,{URL},oil"])))
    assert (check.rows, check.refused, len(check.problems)) == (31, 30, 30)
    assert check.problems[0].line == 2


def test_a_row_with_too_many_cells_fails_alone(manifest):
    made = manifest(f"id,image,prompt\na,{URL},oil, thick\nb,{URL},pencil\n")
    assert refused(made) == {
        (2, "1 cells more than there are columns; quote cells that hold commas")
    }
    assert build_plan(made).rows == 2


def test_a_row_with_too_few_cells_is_refused_for_some_may_be_in_the_wrong_column(manifest):
    made = manifest(f"id,image,prompt,mode\na,{URL},oil\nb,{URL},pencil,\n")
    assert refused(made) == {(2, "3 cells where there are 4 columns")}


@pytest.mark.parametrize(
    ("first", "second"),
    [("cat", "cat"), ("cat", "CAT"), (" cat", "cat "), ("Straße", "Straße"), ("é", "e\u0301")],
)
def test_an_id_given_twice_is_refused_the_second_time_with_the_first_line(manifest, first, second):
    rows = list(manifest(f"id,image,prompt\n{first},{URL},a\n{second},{URL},b\n").rows())
    assert isinstance(rows[0], Row)
    assert isinstance(rows[1], RefusedRow)
    assert rows[1].reason == f"id {second.strip()!r} is on line 2 already; ids name files"


def test_rows_that_are_equal_in_all_and_have_no_id_are_not_paid_twice(manifest):
    made = manifest(f"image,prompt\n{URL},oil\n{URL},oil\n{URL},pencil\n")
    assert [type(row) for row in made.rows()] == [Row, RefusedRow, Row]


def test_made_ids_are_stable_and_tell_the_picture(manifest):
    content = f"image,prompt\n{URL},oil\nhttp://a.test/x%20y.png?sig=1,oil\n"
    first, second = (row.id for row in manifest(content).rows())
    assert first.startswith("cat-")
    assert second.startswith("x y-")
    swapped = "\n".join(content.splitlines()[i] for i in (0, 2, 1))
    assert {row.id for row in manifest(swapped).rows()} == {first, second}


def test_rows_can_be_read_again_from_the_start(manifest):
    made = manifest(GOOD)
    assert list(made.rows()) == list(made.rows())


def test_a_manifest_is_read_from_memory():
    fsspec.filesystem("memory").pipe_file("/manifests/a.csv", GOOD.encode())
    assert build_plan(Manifest("memory://manifests/a.csv")).rows == 2


def test_a_manifest_is_read_from_s3_and_s3_errors_are_manifest_errors():
    with s3_server() as (bucket, client):
        client.put_object(Bucket="pictures", Key="in/a.csv", Body=GOOD.encode())
        assert build_plan(Manifest(f"{bucket}/in/a.csv")).rows == 2
        assert "There is no manifest at" in problem(Manifest(f"{bucket}/in/none.csv"))
        assert "s3://no-bucket/a.csv" in problem(Manifest("s3://no-bucket/a.csv"))


def test_missing_s3_credentials_are_a_manifest_error(monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    # Else botocore asks the metadata service of a cloud.
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    # Nobody listens there, should it get so far.
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    # Another test's store may still be open.
    monkeypatch.delitem(fsspec.config.conf, "s3", raising=False)
    fsspec.filesystem("s3").clear_instance_cache()
    try:
        assert "credentials" in problem(Manifest("s3://bucket/a.csv"))
    finally:
        fsspec.filesystem("s3").clear_instance_cache()


def test_a_name_with_glob_characters_means_just_that_file(tmp_path):
    path = tmp_path / "a[1]*?.csv"
    path.write_text(GOOD)
    assert build_plan(Manifest(str(path))).rows == 2


CHECK = """
import resource, sys
from prefect_flux_kontext.manifest.reader import Manifest
from tests.support.plans import build_plan

def most_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

build_plan(Manifest(sys.argv[1]))
before = most_memory()
check = build_plan(Manifest(sys.argv[2]))
print(check.rows, check.refused, most_memory() - before)
"""


def test_a_hundred_thousand_rows_are_checked_without_being_held(tmp_path):
    paths = [tmp_path / "short.csv", tmp_path / "long.csv"]
    for path, rows in zip(paths, (100, 100_000), strict=True):
        with path.open("w") as file:
            file.write("id,image,prompt\n")
            for number in range(rows):
                file.write(f"row-{number},{URL}?{number},a watercolour {'x' * 200}\n")
    # In a process of its own: nothing else moves its peak.
    ran = subprocess.run(
        [sys.executable, "-c", CHECK, *paths], capture_output=True, text=True, check=True
    )
    rows, refused, memory = map(int, ran.stdout.split())
    assert (rows, refused) == (100_000, 0)
    # Held whole they take over 100 MB; what is kept is a short hash and a line number each.
    assert memory < 40e6
