"""Every format gives the same rows, and says what is wrong with a row in its own numbers."""

import bz2
import gzip
import json
import lzma
import subprocess
import sys
import tracemalloc

import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from prefect_flux_kontext.errors import ManifestError
from prefect_flux_kontext.manifest import formats as opening
from prefect_flux_kontext.manifest import reader as reading
from prefect_flux_kontext.manifest.reader import Manifest
from prefect_flux_kontext.manifest.row import RefusedRow, Row
from tests.support.plans import build_plan

URL = "http://references.test/cat.jpg"
ROWS = [
    {"id": "cat", "image": URL, "prompt": "oil", "mode": "max", "sku": "7"},
    {"id": "dog", "image": URL, "prompt": "pencil", "mode": "pro", "sku": "8"},
]
CSV = "\n".join([",".join(ROWS[0]), *(",".join(row.values()) for row in ROWS)]) + "\n"
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)


def zst(data):
    return zstandard.compress(data)


FILES = {
    "m.csv": CSV.encode(),
    "m": CSV.encode(),
    "m.tsv": CSV.replace(",", "\t").encode(),
    "m.jsonl": JSONL.encode(),
    "m.ndjson": JSONL.encode("utf-8-sig"),
    "m.json": JSONL.replace("\n", "\n\n").encode(),
    "m.csv.gz": gzip.compress(CSV.encode(), mtime=0),
    "two-members.csv.gz": gzip.compress(CSV[:40].encode(), mtime=0)
    + gzip.compress(CSV[40:].encode()),
    "m.csv.zst": zst(CSV.encode()),
    "two-frames.csv.zst": zst(CSV[:40].encode()) + zst(CSV[40:].encode()),
    "m.CSV.BZ2": bz2.compress(CSV.encode()),
    "m.jsonl.xz": lzma.compress(JSONL.encode()),
}


@pytest.fixture
def manifest(tmp_path):
    """Make a manifest of a name and its content."""

    def write(name, content, **how):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return Manifest(str(path), **how)

    return write


def rows(made):
    return [(row.id, row.request.prompt, row.request.mode, row.cells["sku"]) for row in made]


def refused(manifest):
    return [(row.line, row.reason) for row in manifest.rows() if isinstance(row, RefusedRow)]


def problem(manifest):
    with pytest.raises(ManifestError) as caught:
        build_plan(manifest)
    assert manifest.url in caught.value.message
    return caught.value.message


EXPECTED = [("cat", "oil", "max", "7"), ("dog", "pencil", "pro", "8")]


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_by_what_its_name_says_it_is(manifest, name):
    assert rows(manifest(name, FILES[name]).rows()) == EXPECTED


def test_a_parquet_file_is_read_with_rows_numbered_from_one(tmp_path):
    path = tmp_path / "m.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=1)
    made = Manifest(str(path))
    assert rows(made.rows()) == EXPECTED
    assert [row.line for row in made.rows()] == [1, 2]


@pytest.mark.parametrize(
    "given",
    [ROWS, tuple(ROWS), pa.Table.from_pylist(ROWS), pl.DataFrame(ROWS), pd.DataFrame(ROWS)],
    ids=["dicts", "tuple", "arrow", "polars", "pandas"],
)
def test_rows_are_given_directly_and_can_be_read_again(given):
    made = Manifest(given)
    assert rows(made.rows()) == rows(made.rows()) == EXPECTED


def test_columns_have_the_manifests_own_names():
    given = [{"sku": 5, "photo": URL, "text": "oil"}, {"sku": 6, "photo": URL, "text": "ink"}]
    made = Manifest(given, columns={"image": "photo", "prompt": "text", "id": "sku"})
    assert [(row.id, row.request.prompt) for row in made.rows()] == [("5", "oil"), ("6", "ink")]


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"image": "photo"}, "no column 'photo' to be taken as 'image'"),
        ({"picture": "image"}, r"no column \['picture'\] to take another as"),
        ({"prompt": "sku"}, r"has a column twice: \['prompt'\]"),
    ],
)
def test_names_of_columns_that_cannot_be_meant_are_refused(manifest, columns, told):
    with pytest.raises(ManifestError, match=told):
        build_plan(manifest("m.csv", CSV, columns=columns))


def test_a_name_that_no_object_has_is_refused(manifest):
    made = manifest("m.jsonl", JSONL, columns={"provider": "route"})
    assert "No row of" in problem(made)


def test_types_become_the_text_a_csv_file_would_have():
    given = [{"id": 1, "prompt": "x", "n": 2.5, "b": True, "none": None, "many": ["a", {"é": 1}]}]
    (row,) = Manifest(given).rows()
    assert row.cells == {
        "id": "1",
        "prompt": "x",
        "n": "2.5",
        "b": "true",
        "none": "",
        "many": '["a", {"é": 1}]',
    }


def test_a_number_and_its_text_are_the_same_id():
    given = [{"id": 1, "prompt": "x"}, {"id": "1", "prompt": "y"}]
    assert "id '1' is on line 1 already" in refused(Manifest(given))[0][1]


def test_lists_of_references_come_from_typed_columns(tmp_path):
    table = pa.table({"prompt": ["x"], "images": [[URL, "http://a.test/b.jpg"]]})
    (row,) = Manifest(table).rows()
    assert row.request.image_urls == [URL, "http://a.test/b.jpg"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"prompt": "x"', "the line is not JSON: Expecting ',' delimiter at character 15"),
        ('["x"]', "it is not an object but list"),
        ('{"prompt": "x", "n": NaN}', "NaN is not JSON"),
        ('{"prompt": "x", "prompt": "y"}', "it names prompt twice"),
        ('{"prompt": "x", "n": ' + "[" * 100_000 + "}", "nested too deeply"),
        ('{"prompt": "x", "n": ' + "1" * 5_000 + "}", "a number of thousands of digits"),
        ('{"prompt": "\\ud800"}', "prompt holds half a character"),
        ('{"prompt": "a\\u0000b"}', "prompt holds a NUL character"),
        ('{"prompt": "' + "x" * 200_000 + '"}', "prompt has 200,000 characters"),
        ('{"name": "x"}', "neither a column `image` nor `prompt`"),
        ('{"Prompt": "x"}', "has a column 'Prompt'; spell it `prompt`"),
    ],
)
def test_a_broken_line_in_the_middle_is_told_and_the_others_are_read(manifest, line, told):
    made = manifest("m.jsonl", f'{{"prompt": "a"}}\n{line}\n{{"prompt": "b"}}\n')
    ((number, reason),) = refused(made)
    assert number == 2
    assert told in reason
    assert build_plan(made).rows == 3


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("m.json", '[\n{"prompt": "x"}\n]\n', "JSON over several lines"),
        ("m.jsonl", JSONL.encode("utf-16"), "not JSON Lines in UTF-8"),
        ("m.jsonl", "<html></html>", "not JSON Lines"),
        ("m.jsonl", '{"prompt": "' + "x" * 1_000_001, "Line 1 .*more than 1,000,000 characters"),
        ("m.jsonl", "", "has no rows"),
        (
            "m.csv.gz",
            gzip.compress(CSV.encode() * 9, mtime=0)[:-9],
            "ended before the end-of-stream",
        ),
        ("m.csv.gz", CSV, "[Nn]ot a gzipped file"),
        ("m.csv.zst", zst(CSV.encode())[:-5], "cut off"),
        ("m.csv.zst", CSV, "cannot be read"),
        ("m.parquet", b"PAR1" + bytes(100), "cannot be read"),
        ("m.parquet", "", "cannot be read"),
        ("m.parquet.gz", gzip.compress(b"PAR1", mtime=0), "unpack it"),
        ("m.parquet", CSV, "cannot be read"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused(manifest, name, content, told):
    import re  # noqa: PLC0415

    assert re.search(told, problem(manifest(name, content)))


def test_a_truncated_parquet_file_is_refused(tmp_path, manifest):
    path = tmp_path / "whole.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    assert "cannot be read" in problem(manifest("cut.parquet", path.read_bytes()[:-20]))


def test_a_chain_of_filesystems_is_refused():
    assert "chains several" in problem(Manifest("simplecache::memory://m.csv"))


def test_what_is_no_manifest_at_all_is_refused():
    with pytest.raises(ManifestError, match="not int"):
        build_plan(Manifest(7))


def test_a_little_parquet_file_that_holds_gigabytes_is_refused_in_little_memory(tmp_path):
    path = tmp_path / "bomb.parquet"
    long = pa.DictionaryArray.from_arrays(pa.array([0] * 5_000, pa.int32()), ["x" * 1_000_000])
    pq.write_table(pa.table({"id": range(5_000), "prompt": long}), path, compression="zstd")
    assert path.stat().st_size < 100_000
    tracemalloc.start()
    try:
        assert "a cell of 1,000,000 bytes in prompt" in problem(Manifest(str(path)))
        assert tracemalloc.get_traced_memory()[1] < 30e6
    finally:
        tracemalloc.stop()
    assert pa.total_allocated_bytes() < 100e6


def test_a_little_packed_file_that_unpacks_without_end_is_refused(manifest, monkeypatch):
    monkeypatch.setattr(opening, "_BOMB_FROM", 10_000_000)
    bomb = manifest("m.csv.gz", gzip.compress(b"id,prompt\n" + b"\n" * 20_000_000, mtime=0))
    assert "unpacks to more than" in problem(bomb)


def test_a_manifest_of_too_many_rows_is_refused(monkeypatch):
    monkeypatch.setattr(reading, "MOST_ROWS", 3)
    assert "more than 3 rows" in problem(Manifest([{"prompt": "x"}] * 4))


@pytest.mark.parametrize(
    ("module", "name", "extra"),
    [("pyarrow", "m.parquet", "parquet"), ("zstandard", "m.csv.zst", "zstd")],
)
def test_without_the_extra_it_is_told_what_to_install(tmp_path, module, name, extra):
    (tmp_path / name).write_bytes(b"x")
    code = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "from prefect_flux_kontext.manifest.reader import Manifest\n"
        "try:\n"
        f"    list(Manifest({str(tmp_path / name)!r}).rows())\n"
        "except Exception as error:\n"
        "    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert f"install `prefect-flux-kontext[{extra}]`" in done.stdout


def test_rows_of_every_kind_are_rows():
    assert all(isinstance(row, Row) for row in Manifest(ROWS).rows())
